"""The arrays of one evaluation, checked and encoded once for all metrics."""

from dataclasses import dataclass

import numpy as np

from llmrec_peft.errors import DataError


@dataclass(frozen=True)
class Targets:
    """Checked arrays of one evaluation: labels [n], probabilities [n, C], codes of users [n] and of lists [n]."""

    labels: np.ndarray
    probabilities: np.ndarray
    users: np.ndarray
    num_users: int
    lists: np.ndarray | None

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]


def read_targets(labels, probabilities, users=None, lists=None) -> Targets:
    """Check and encode the arrays of an evaluation.

    Raises DataError where lengths differ, nothing is given, a value is NaN or infinite, a probability row does not
    sum to 1 (within 1e-3), a label is outside 0 ... C-1, a user is null, or a list spans two users.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise DataError(
            f"probabilities must be [targets, classes] with two classes or more, got shape {probabilities.shape}: "
            "give one column a class, in class order"
        )
    n, classes = probabilities.shape
    if n == 0:
        raise DataError("metrics need at least one target, got 0: check the split and its limits")
    bad = ~np.isfinite(probabilities).all(axis=1)
    _refuse(bad, "probabilities must be finite", probabilities, "look for a diverged training or an overflow in fp16")
    bad = (probabilities < 0).any(axis=1) | (np.abs(probabilities.sum(axis=1) - 1) > 1e-3)
    _refuse(bad, "probabilities must be >= 0 and sum to 1 in each row", probabilities, "pass softmax, not logits")
    labels = _read_labels(labels, n, classes)
    user_codes = np.zeros(n, dtype=np.int64) if users is None else _encode(users, n, "users")
    list_codes = None if lists is None else _encode(lists, n, "lists")
    if list_codes is not None:
        first = np.zeros(list_codes.max() + 1, dtype=np.int64)
        first[list_codes[::-1]] = user_codes[::-1]
        shared = user_codes != first[list_codes]
        _refuse(shared, "a list belongs to one user", np.asarray(lists), "give each candidate set its own list id")
    return Targets(labels, probabilities, user_codes, int(user_codes.max()) + 1, list_codes)


def _read_labels(labels, n: int, classes: int) -> np.ndarray:
    raw = np.asarray(labels)
    if raw.shape != (n,):
        raise DataError(f"labels must be [{n}] to match the probabilities, got shape {raw.shape}: give one a target")
    if raw.dtype.kind not in "iufb":
        raise DataError(f"labels must be class numbers 0 to {classes - 1}, got {raw.dtype}: map names to numbers first")
    with np.errstate(invalid="ignore"):
        codes = raw.astype(np.int64)
    bad = (codes != raw) | (codes < 0) | (codes >= classes)
    _refuse(bad, f"labels must be whole numbers from 0 to {classes - 1}", raw, "check the domain's outcomes")
    return codes


def _encode(ids, n: int, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.shape != (n,):
        raise DataError(f"{what} must be [{n}] to match the probabilities, got shape {ids.shape}: give one a target")
    null = np.array([_is_null(value) for value in ids]) if ids.dtype == object else ids != ids
    _refuse(null, f"{what} must not be null", ids, "drop or name these targets")
    try:
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        raise DataError(f"{what} must be of one type, got a mixture ({error}): convert them to strings") from error


def _is_null(value) -> bool:
    """None, NaN, NaT and pandas' NA, which alone refuses to be called equal or not."""
    if value is None:
        return True
    try:
        return bool(value != value)
    except TypeError:
        return True


def _refuse(bad: np.ndarray, rule: str, values: np.ndarray, step: str) -> None:
    """Raise DataError with the count, the first offending row and its value, if any row is bad."""
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(f"{rule}, but {int(bad.sum())} of {len(bad)} rows do not: row {row} is {values[row]}: {step}")
