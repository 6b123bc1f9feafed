"""Where a recipe may write: not into its inputs, and not into a complete artifact of another kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmrec_peft.errors import ConfigError
from llmrec_peft.messages import shortened


def _has(directory: Path, *names: str) -> bool:
    return all((directory / name).is_file() for name in names)


_KINDS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("a bundle or a merged model", lambda path: (path / "behavior.json").is_file()),
    ("an export", lambda path: (path / "serving.json").is_file()),
    ("a retrieval index", lambda path: _has(path, "index.json", "index.safetensors") or _has(path, "evidence.json")),
    ("a base model", lambda path: (path / "config.json").is_file() and any(path.glob("*.safetensors"))),
    ("a log", lambda path: path.is_dir() and any(path.glob("interactions[.-]*"))),
    ("a run's checkpoints", lambda path: path.name == "checkpoints" and (path / "streams.json").is_file()),
    ("a run's logs", lambda path: path.name == "logs" and (path.parent / "config.yaml").is_file()),
)


def check_writable(directory: Path, what: str = "output_dir") -> None:
    """Raise ConfigError unless `directory` can be made and written."""
    place = directory.absolute()
    while not _exists_or_is_link(place, what) and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "is not a directory" if not place.is_dir() else "may not be written"
        raise ConfigError(f"{what} {directory} cannot be written ({place} {reason}); choose another")


def check_output_directory(
    directory: str | Path,
    inputs: Mapping[str, str | None],
    *,
    what: str = "output_dir",
    writes: Sequence[str] = (),
    own: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Check, before the minutes of work, that a directory can be written and that no input or artifact would be lost.

    Links and `..` are followed.

    Args:
        directory: directory to write into.
        inputs: paths that the recipe reads, by the key that names them; None and names that are not paths are ignored.
        what: the key that names the directory.
        writes: names in the directory that the recipe writes or clears.
        own: whether this recipe may replace, or add to, a directory that holds a complete artifact.

    Raises:
        ConfigError: naming both paths.
    """
    out = Path(directory)
    check_writable(out, what)
    for key, value in inputs.items():
        if value is None or not _exists(value):
            continue
        read = Path(value)
        if _same(out, read) or (read.is_dir() and _lies_in(out, read)):
            raise ConfigError(f"{what} {out} is {key} {read}, or lies in it; choose a directory of its own")
        if key.startswith(("data", "items")) and read.is_dir() and _lies_in(read, out):
            raise ConfigError(f"{key} {read} lies in {what} {out}; choose a directory of its own")
        for name in writes:
            if _same(read, out / name) or _lies_in(read, out / name):
                raise ConfigError(f"{key} {read} would be replaced by {name} of {what} {out}; choose another directory")
    for place in (out, *Path(os.path.realpath(out)).parents):
        kind = kind_of(place)
        if kind is not None and not own(place):
            raise ConfigError(f"{what} {out} {'is' if place is out else 'lies in'} {kind} ({place}); choose another")


def check_output_file(
    path: str,
    inputs: Mapping[str, str | None],
    *,
    what: str = "output",
    own: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Check one output file: it is not an input, does not lie in an artifact, and replaces only a file of its own kind.

    own: whether this recipe may replace a regular file that exists there.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{what} {path} is a directory; name a file")
    place = Path(os.path.realpath(path))
    check_writable(place.parent, what)
    for key, value in inputs.items():
        if value is not None and _exists(value) and (_same(place, Path(value)) or _lies_in(place, Path(value))):
            raise ConfigError(f"{what} {path} is {key} {value}, or lies in it; choose another file")
    check_output_directory(place.parent, {}, what=what)
    if _exists_or_is_link(Path(path), what) and not (is_plain(Path(path)) and own(Path(path))):
        kind = "a file that this recipe did not write" if is_plain(Path(path)) else "a link, a device or a pipe"
        raise ConfigError(f"{what} {path} is {kind}, so it is not replaced; choose another file, or remove it")


def is_plain(path: Path) -> bool:
    """Whether a path is a regular file and not a link."""
    return path.is_file() and not path.is_symlink()


def kind_of(directory: Path) -> str | None:
    """The artifact that a directory holds, in words; None for anything else."""
    try:
        return next((kind for kind, is_one in _KINDS if is_one(directory)), None)
    except OSError:
        return None


def _exists_or_is_link(place: Path, what: str) -> bool:
    """Whether a path exists, even as a broken link; ConfigError where it cannot be used at all."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{what} {shortened(place)} cannot be used ({reason}); choose another") from None
    return True


def _exists(value: str) -> bool:
    try:
        return os.path.exists(value)
    except ValueError:
        return False


def _same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _lies_in(inner: Path, outer: Path) -> bool:
    return any(_same(parent, outer) for parent in Path(os.path.realpath(inner)).parents)
