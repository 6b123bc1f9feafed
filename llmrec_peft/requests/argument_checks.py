"""Checks of lists and counts that callers pass to a scorer, a bank or a recommender."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmrec_peft.errors import DataError, LLMRecError, input_errors
from llmrec_peft.messages import quoted


def check_list(what: str, value: Any) -> None:
    """Raise DataError unless `value` is a list; a text, bytes or a mapping is not a list."""
    wrong = isinstance(value, str | bytes | bytearray | memoryview | Mapping)
    if wrong or not isinstance(value, Sequence | np.ndarray) or (isinstance(value, np.ndarray) and not value.ndim):
        raise DataError(f"{what} must be a list, not {quoted(value)}; correct it")


def as_list(what: str, values: Any) -> list[Any]:
    """Any iterable as a list. Raises DataError for anything else, and for a text or a mapping."""
    with input_errors(DataError, what, "give a list of tuples"):
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise DataError(f"{what} must be a list, not {quoted(values)}; correct it")
        return list(values)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return not isinstance(value, bool) and isinstance(value, int | np.integer) and bool(value >= 1)


def check_count(what: str, value: Any, error: type[LLMRecError], advice: str) -> None:
    """Raise `error` unless `value` is a whole number of at least 1."""
    if not is_count(value):
        raise error(f"{what} must be at least 1 and whole, not {quoted(value)}; {advice}")
