"""Download MovieLens: resume an interrupted download, verify the checksum, unpack all files or none.

python -m llmrec_peft.data.download ml-latest-small
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pooch
import requests
import urllib3
from tqdm.auto import tqdm

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.errors import DataError, LLMRecError, one_line
from llmrec_peft.files import scratch_directory
from llmrec_peft.messages import listed

BLOCK = 1 << 18
ATTEMPTS = 5
"""Connections without progress before a download fails; each resumes where the last broke off."""
WAIT = 1.0
"""Seconds before another connection, times the failures in a row."""
TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as broken."""
MAX_UNPACKED = 20 << 30
"""Most unpacked bytes of an archive; the largest MovieLens has a tenth of it."""


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
"""MovieLens archives and their checksums. Terms of GroupLens: non-commercial use, cite Harper & Konstan 2015."""


def default_directory() -> Path:
    """Directory of data sets: `$LLMREC_PEFT_CACHE/data`, else `~/.cache/llmrec_peft/data`."""
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

    An archive that is unpacked already is not downloaded again. The next call resumes a partial download.

    Args:
        name: one of `ARCHIVES`.
        directory: where the data set's own directory is made; `default_directory()` by default.
        url: another URL of the archive.
        checksum: `sha256:hex` or `md5:hex` of another edition; the known one by default.

    Raises:
        DataError: an unknown name, a transfer that keeps failing, a wrong checksum, an unsafe archive.
    """
    if name not in ARCHIVES and (url is None or checksum is None):
        raise DataError(
            f"no archive {name!r}; known are {listed(list(ARCHIVES))}; give the URL and the checksum of another"
        )
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

    Pooch verifies the checksum and moves the file into place. Pooch does not resume, so that our own downloader does:
    bytes go to `<path>.part`, and after a connection that breaks, now or in an earlier call, an HTTP Range request asks
    for the rest. If the server ignores it, the file starts anew.

    Args:
        checksum: `sha256:hex` or `md5:hex`.

    Raises:
        DataError: the server refuses, the transfer breaks `ATTEMPTS` times without progress, or the checksum is wrong,
            in which case the bytes are removed.
    """
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in ("sha256", "md5") or not expected:
        raise DataError(f"checksum {checksum!r} must be sha256:<hex> or md5:<hex>")
    part = path.with_name(path.name + ".part")

    def download(url: str, output: str, _: pooch.Pooch | None) -> None:
        _download_part(url, part)
        os.replace(part, output)

    try:
        return Path(pooch.retrieve(url, checksum.lower(), path.name, path.parent, downloader=download))
    except LLMRecError:
        raise
    except ValueError as error:  # pooch has removed the file
        found = re.search(r"but got (\w+)", str(error))
        raise DataError(
            f"{url} has {algorithm} {found[1] if found else 'unknown'}, expected {expected}; the file was removed: try "
            "again, or pass checksum= if a new edition was published"
        ) from error


def _download_part(url: str, part: Path) -> None:
    """Download all bytes to `part`, over several connections if need be."""
    failures, most = 0, _size(part)
    while (fault := _transfer(url, part)) is not None:
        after = _size(part)
        # Only bytes beyond all that came before count as progress: a server that makes us start anew does not.
        failures = 1 if after > most else failures + 1
        most = max(most, after)
        if failures >= ATTEMPTS:
            raise DataError(
                f"{url} broke off {failures} times at {after} bytes ({fault}); run again to resume from {part}"
            )
        time.sleep(WAIT * failures)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path) -> str | None:
    """Make one connection and append to `part`; returns None when all bytes are there, else why it broke off.

    Raises:
        DataError: the server refuses for good, or the URL cannot be fetched.
    """
    have = _size(part)
    headers = {"User-Agent": "llmrec_peft", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416 and have:
                # Nothing lies beyond what we have. Either it is whole and the checksum decides, or it is another file.
                if response.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return None
                part.unlink()
            elif 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                raise DataError(
                    f"{url} answers {response.status_code} {response.reason}; check the URL or download by hand"
                )
            if response.status_code not in (200, 206):
                return f"{response.status_code} {response.reason}"
            start = have if response.status_code == 206 else 0
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                return "the server sent another range"
            return _append(response, part, start)
    except LLMRecError:
        raise
    except ValueError as error:
        raise DataError(f"{url!r} is not a URL that can be fetched: {error}; give http:// or https://") from error
    except (OSError, urllib3.exceptions.HTTPError) as error:
        return one_line(error)


def _append(response: requests.Response, part: Path, start: int) -> str | None:
    """Write the body of a response to `part` from byte `start` on; returns why it is not whole, or None."""
    length, ranged = (
        response.headers.get("Content-Length"),
        response.headers.get("Content-Range", "").rpartition("/")[2],
    )
    if response.status_code == 206 and ranged.isdigit():  # chunked answers have no length
        total: int | None = int(ranged)
    else:
        total = start + int(length) if length else None
    with (
        open(part, "ab" if start else "wb") as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=f"downloading {part.stem}") as bar,
    ):
        # `iter_content` would lose the last block of a connection that breaks.
        while block := response.raw.read1(BLOCK):
            file.write(block)
            bar.update(len(block))
        done = file.tell()
    return None if total in (None, done) else "the connection closed early"


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a zip archive into the directory `target`, which appears only when every file is unpacked.

    An archive whose files all lie in one directory loses that level.

    Raises:
        DataError: not a zip, a damaged file in it, a path outside the target, a link, more than `MAX_UNPACKED` bytes.
    """
    try:
        with scratch_directory(target) as work:
            _extract(archive, work, target)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{archive} cannot be unpacked into {target}: {error}; remove it and download again") from error
    return target


def _extract(archive: Path, work: Path, target: Path) -> None:
    """Unpack all files into `work`, and move what it holds to `target`."""
    with zipfile.ZipFile(archive) as content:
        entries = [entry for entry in content.infolist() if not entry.is_dir()]
        _check_entries(entries, archive)
        for entry in tqdm(entries, unit="file", desc=f"unpacking {archive.name}", delay=2):
            place = work / entry.filename
            place.parent.mkdir(parents=True, exist_ok=True)
            with content.open(entry) as source, open(place, "wb") as sink:
                shutil.copyfileobj(source, sink, BLOCK)
    tops = list(work.iterdir())
    inner = tops[0] if len(tops) == 1 and tops[0].is_dir() else work
    inner.chmod(0o755)
    os.replace(inner, target)


def _check_entries(entries: list[zipfile.ZipInfo], archive: Path) -> None:
    if not entries:
        raise DataError(f"{archive} holds no files; download it again")
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
            raise DataError(f"{archive} holds {entry.filename!r}, which leads out of its directory; do not use it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(f"{archive} holds the link {entry.filename!r}; only plain files are unpacked")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_UNPACKED:
        raise DataError(f"{archive} unpacks to {total} bytes, more than {MAX_UNPACKED}; do not use it")


def main(arguments: list[str] | None = None) -> int:
    """Command line: download a data set and print its directory; on failure print one line and exit with code 2."""
    parser = argparse.ArgumentParser(prog="llmrec download", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="ml-latest-small", help=f"one of {listed(list(ARCHIVES))}")
    parser.add_argument("--directory", help="parent directory of the data set; default: the package's cache directory")
    parser.add_argument("--url", help="URL of the archive, to use another mirror or edition")
    parser.add_argument("--checksum", help="checksum of the archive at --url, as sha256:<hex> or md5:<hex>")
    options = parser.parse_args(arguments)
    try:
        with exit_on_error():
            print(download_movielens(options.name, options.directory, options.url, checksum=options.checksum))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
