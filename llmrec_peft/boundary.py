"""The boundary of every command: errors of the input or the machine become one line and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmrec_peft.errors import LLMRecError, machine_fault

USAGE_ERROR = 2
"""Exit code of a recipe that refuses its input."""
INTERRUPTED = 130
"""Exit code of a recipe that was interrupted, as shells have it."""

_log = logging.getLogger(__name__)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn errors of the input or the machine into one line on standard error and exit code 2.

    These are the errors that this package raises on purpose, and what the machine refuses: space, permissions, memory,
    file names. An interrupt exits with 130. Every other exception keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _print_line("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        line = str(error) if isinstance(error, LLMRecError) else machine_fault(error)
        if line is None:
            raise
        _log.debug("refused", exc_info=True)
        if isinstance(error, BrokenPipeError):
            _drop_output()
        if not getattr(error, "reported_elsewhere", False):
            _print_line(line)
        raise SystemExit(USAGE_ERROR) from None


def _print_line(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {' '.join(line.split())}", file=sys.stderr)


def _drop_output() -> None:
    """Discard pending output: no process reads it, and the interpreter would fail on it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
