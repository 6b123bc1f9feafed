"""The errors that users of this package may catch.

LLMRecError (a ValueError)
├── ConfigError      a configuration key, value or combination that cannot run
├── DataError        a log, an item table or a split that breaks a rule
├── DomainError      a domain file that cannot be used
├── StreamError      an event or a window that cannot become a stream
├── ModelError       a base model or method that does not support the request
└── BundleError      an adapter bundle that is damaged or does not match

Each message is one line that names the thing, the rule, the value received and the next step.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class LLMRecError(ValueError):
    """Base of all errors that this package raises on purpose.

    Line breaks and other characters that cannot be printed are escaped. A message of more than 2,000 characters loses
    its middle. `reported_elsewhere` is set if several processes fail by one error and another process prints it.
    """

    reported_elsewhere = False

    def __init__(self, message: object = "") -> None:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
        super().__init__(text if len(text) <= 2000 else f"{text[:1000]} ... {text[-995:]}")


class ConfigError(LLMRecError):
    """A configuration key, value or combination that cannot run."""


class DataError(LLMRecError):
    """A log, an item table or a split that breaks a rule."""


class DomainError(LLMRecError):
    """A domain file that cannot be used."""


class StreamError(LLMRecError):
    """An event or a window that cannot become a stream."""


class ModelError(LLMRecError):
    """A base model or a tuning method that does not support the request."""


class BundleError(LLMRecError):
    """An adapter bundle that is damaged or does not match what it is loaded on."""


@contextmanager
def input_errors(kind: type[LLMRecError], what: str, advice: str) -> Iterator[None]:
    """Turn what a library raises on a user's input into one of our errors.

    Wrap the whole reading of a log, a bundle, a configuration or a request in it, never a computation. Our own errors
    pass unchanged. The library's exception is the cause of the new one.

    Args:
        kind: the class to raise.
        what: what is read, such as `log /data/x`.
        advice: what the user can do.
    """
    try:
        yield
    except LLMRecError:
        raise
    except MemoryError as error:
        raise kind(f"{what} does not fit into memory; {advice}") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        file = f": {error.filename}" if error.filename else ""
        raise kind(f"{what} cannot be used ({reason}{file}); {advice}") from error
    except Exception as error:
        raise kind(f"{what} cannot be used ({type(error).__name__}: {one_line(error)}); {advice}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; not an Exception, and without a module
            raise
        raise kind(f"{what} cannot be used ({one_line(error)}); {advice}") from error


@contextmanager
def output_errors(kind: type[LLMRecError], what: str, advice: str) -> Iterator[None]:
    """Turn what any library raises when the disk is full or not writable into one of our errors.

    Args:
        kind: the class to raise.
        what: what is written, such as `bundle /data/x`.
        advice: what the user can do.
    """
    try:
        yield
    except LLMRecError:
        raise
    except Exception as error:
        if machine_fault(error) is None:
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise kind(f"{what} cannot be written ({reason}); {advice}") from error


def machine_fault(error: BaseException) -> str | None:
    """One line on what the machine refused (space, permissions, memory, names), or None for an error of another kind.

    safetensors, tokenizers and torch wrap such errors in their own classes.
    """
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    wrapped = _OS_ERROR.search(text)
    if number is None and wrapped is not None:
        number = int(wrapped[1])
    if isinstance(error, MemoryError) or _NO_MEMORY.search(f"{type(error).__name__} {text}"):
        return f"not enough memory ({text[:160] or 'MemoryError'}); {_ADVICE[errno.ENOMEM]}"
    if number is None and not isinstance(error, OSError) and not _ARCHIVE.search(text):
        return None
    reason = text[:300] if number is None else os.strerror(number)
    files = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    place = f"{' to '.join(name if len(name) <= 100 else f'{name[:50]}...{name[-50:]}' for name in files)}: "
    return f"{place if files else ''}{reason}; {_ADVICE.get(number or 0, 'correct it and start again')}"


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""Format of an OSError in messages of libraries written in Rust."""
_ARCHIVE = re.compile(r"inline_container|PytorchStreamWriter|file write failed|iostream error")
"""Messages of torch for an archive that could not be written."""
_NO_MEMORY = re.compile(r"^OutOfMemoryError|can't allocate memory|not enough memory")
_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "choose a place that takes files of this size",
    errno.EACCES: "choose a place that may be used",
    errno.EPERM: "choose a place that may be used",
    errno.EROFS: "choose a place that may be written",
    errno.ENOENT: "give an existing one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "choose a path without a circle of links",
    errno.EMFILE: "let a process open more files (ulimit -n)",
    errno.ENFILE: "let the machine open more files",
    errno.ENOMEM: "use a smaller model, fewer tokens at once, or a larger machine",
    errno.EPIPE: "let its reader read to the end",
}


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, shortened."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def joined_lines(error: BaseException, limit: int = 300) -> str:
    """All lines of an error's message in one line, cut to `limit` characters, without the final period."""
    return " ".join(str(error).split())[:limit].rstrip(". ")
