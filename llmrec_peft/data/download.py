"""Download of MovieLens: resumed where it broke off, verified before it counts, unpacked whole or not at all.

python -m llmrec_peft.data.download ml-latest-small
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.errors import DataError
from llmrec_peft.files import scratch_directory
from llmrec_peft.messages import listed

BLOCK = 1 << 18
ATTEMPTS = 5
"""Connections made for one file: each goes on from where the last broke off."""
WAIT = 1.0
"""Seconds before another connection, times the failures in a row."""
TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as broken."""
MAX_UNPACKED = 20 << 30
"""Bytes that an archive may unpack to; the largest MovieLens takes a tenth of it."""


@dataclass(frozen=True)
class Archive:
    """A published archive: its URL and its checksum as `algorithm:hex`."""

    url: str
    checksum: str


ARCHIVES = {
    name: Archive(f"https://files.grouplens.org/datasets/movielens/{name}.zip", checksum)
    for name, checksum in {
        "ml-latest-small": "sha256:696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
        "ml-100k": "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        "ml-1m": "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        "ml-10m": "md5:ce571fd55effeba0271552578f2648bd",
        "ml-20m": "sha256:96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
        "ml-25m": "sha256:8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    }.items()
}
"""MovieLens archives and their checksums. GroupLens sets the terms: non-commercial, cite Harper & Konstan 2015."""


def default_directory() -> Path:
    """Where data sets go: `$LLMREC_PEFT_CACHE/data`, else `~/.cache/llmrec_peft/data`."""
    root = os.environ.get("LLMREC_PEFT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "llmrec_peft") / "data"


def download_movielens(
    name: str = "ml-latest-small",
    directory: str | Path | None = None,
    url: str | None = None,
    *,
    checksum: str | None = None,
) -> Path:
    """Download and unpack a MovieLens archive, and return the directory that `BehaviorLog.read` reads.

    An archive that is unpacked already is not downloaded again. A partial download is kept, and the next call resumes
    it.

    Args:
        name: one of `ARCHIVES`.
        directory: where the data set's own directory is made; `default_directory()` by default.
        url: another place to take the archive from.
        checksum: `sha256:hex` or `md5:hex` of another edition; the known one by default.

    Raises:
        DataError: an unknown name, a transfer that keeps failing, a wrong checksum, an unsafe archive.
    """
    if name not in ARCHIVES and (url is None or checksum is None):
        raise DataError(f"no archive {name!r}; known are {listed(list(ARCHIVES))}; give url= and checksum= for another")
    if not name or name != Path(name).name or name in (".", "..") or "\0" in name:
        raise DataError(f"archive name {name!r} must be a plain directory name, such as ml-latest-small")
    url = url or ARCHIVES[name].url
    checksum = checksum or ARCHIVES[name].checksum
    root = Path(directory) if directory is not None else default_directory()
    if "\0" in str(root):
        raise DataError(f"directory {str(root)!r} holds a NUL character; choose another")
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    archive = fetch(url, root / f"{name}.zip", checksum)
    unpack(archive, target)
    archive.unlink()
    return target


def fetch(url: str, path: Path, checksum: str) -> Path:
    """Download a file to `path`, which appears only when its checksum is right.

    Bytes go to `<path>.part`. A connection that breaks, now or in an earlier call, is taken up with an HTTP Range
    request; if the server ignores it, the file starts anew.

    Args:
        checksum: `sha256:hex` or `md5:hex`.

    Raises:
        DataError: the server refuses, the transfer breaks `ATTEMPTS` times without getting anywhere, or the checksum
            is wrong, in which case the bytes are removed.
    """
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in ("sha256", "md5") or not expected:
        raise DataError(f"checksum {checksum!r} must be sha256:<hex> or md5:<hex>")
    if path.is_file() and _digest(path, algorithm) == expected.lower():
        return path
    part = path.with_name(path.name + ".part")
    failures, most = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            if _transfer(url, part):
                break
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    f"{url} answers {error.code} {error.reason}; check the URL or download by hand"
                ) from error
            reason = f"{error.code} {error.reason}"
        except ValueError as error:
            raise DataError(f"{url!r} is not a URL that can be fetched: {error}; give http:// or https://") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        # Only bytes beyond all that came before count as progress: a server that makes us start anew does not.
        failures = 1 if after > most else failures + 1
        most = max(most, after)
        if failures >= ATTEMPTS:
            raise DataError(
                f"{url} broke off {failures} times at {after} bytes ({reason}); run again to resume from {part}"
            )
        time.sleep(WAIT * failures)
    found = _digest(part, algorithm)
    if found != expected.lower():
        part.unlink()
        raise DataError(
            f"{url} has {algorithm} {found}, expected {expected}; the file was removed: try again, or pass "
            "checksum= if a new edition was published"
        )
    os.replace(part, path)
    return path


def _transfer(url: str, part: Path) -> bool:
    """One connection; True when all bytes that the server announced are in `part`."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "llmrec_peft", "Accept-Encoding": "identity"})
    if request.type not in ("http", "https"):
        raise ValueError(f"scheme {request.type}")
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416 or not have:
                raise
            # Nothing lies beyond what we have: either it is whole, or it is not this file. The checksum or a new start
            # decides.
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                return True
            part.unlink()
            return False
    with response:
        start, total = have, None
        if response.status == 206:
            start, total = _content_range(response.headers.get("Content-Range", ""))
            if start != have:
                part.unlink()
                return False
        else:
            start = 0
            if response.headers.get("Content-Length"):
                total = int(response.headers["Content-Length"])
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=f"downloading {Path(part).stem}") as bar,
        ):
            done = start
            while block := response.read(BLOCK):
                file.write(block)
                done += len(block)
                bar.update(len(block))
    return total is None or done == total


def _content_range(header: str) -> tuple[int, int | None]:
    """`bytes 100-199/200` as (100, 200); (-1, None) if it cannot be read."""
    unit, _, rest = header.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit():
        return -1, None
    return int(first), int(total) if total.isdigit() else None


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a zip archive into the directory `target`, which appears only when every file is out.

    An archive whose files all lie in one directory loses that level.

    Raises:
        DataError: not a zip, a damaged member, a path that leaves the target, a link, more than `MAX_UNPACKED` bytes.
    """
    try:
        with scratch_directory(target) as work:
            _extract(archive, work, target)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{archive} cannot be unpacked into {target}: {error}; remove it and download again") from error
    return target


def _extract(archive: Path, work: Path, target: Path) -> None:
    """Unpack all members into `work`, and move what it holds to `target`."""
    with zipfile.ZipFile(archive) as content:
        members = [member for member in content.infolist() if not member.is_dir()]
        _check_members(members, archive)
        for member in tqdm(members, unit="file", desc=f"unpacking {archive.name}", delay=2):
            place = work / member.filename
            place.parent.mkdir(parents=True, exist_ok=True)
            with content.open(member) as source, open(place, "wb") as sink:
                shutil.copyfileobj(source, sink, BLOCK)
    tops = list(work.iterdir())
    inner = tops[0] if len(tops) == 1 and tops[0].is_dir() else work
    inner.chmod(0o755)
    os.replace(inner, target)


def _check_members(members: list[zipfile.ZipInfo], archive: Path) -> None:
    if not members:
        raise DataError(f"{archive} holds no files; download it again")
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
            raise DataError(f"{archive} holds {member.filename!r}, which leads out of its directory; do not use it")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{archive} holds the link {member.filename!r}; only plain files are unpacked")
    total = sum(member.file_size for member in members)
    if total > MAX_UNPACKED:
        raise DataError(f"{archive} unpacks to {total} bytes, more than {MAX_UNPACKED}; do not use it")


def main(arguments: list[str] | None = None) -> int:
    """Command line: download a data set and print its directory; exit code 2 with one line when it cannot."""
    parser = argparse.ArgumentParser(prog="llmrec download", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="ml-latest-small", help=f"one of {listed(list(ARCHIVES))}")
    parser.add_argument("--directory", help="where to put it; default: the package's cache directory")
    parser.add_argument("--url", help="another place to take the archive from")
    parser.add_argument("--checksum", help="sha256:<hex> or md5:<hex> of another edition")
    options = parser.parse_args(arguments)
    try:
        with exit_on_error():
            print(download_movielens(options.name, options.directory, options.url, checksum=options.checksum))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
