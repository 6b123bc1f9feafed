"""The arrays of one evaluation, checked and encoded once for all metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.errors import DataError


@dataclass(frozen=True)
class Targets:
    """Checked arrays of one evaluation.

    Attributes:
        labels: [n], class numbers.
        probabilities: [n, C], in class order.
        users: [n], codes 0 ... num_users - 1.
        candidate_sets: [n], codes of the candidate set of each target, or None.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    users: NDArray[np.int64]
    num_users: int
    candidate_sets: NDArray[np.int64] | None

    @property
    def classes(self) -> int:
        """Number of classes, C."""
        return self.probabilities.shape[1]


def read_targets(
    labels: ArrayLike,
    probabilities: ArrayLike,
    users: ArrayLike | None = None,
    candidate_sets: ArrayLike | None = None,
) -> Targets:
    """Check and encode the arrays of an evaluation; without `users` all targets are of one.

    Raises DataError where lengths differ, nothing is given, a value is NaN or infinite, a probability row does not
    sum to 1 (within 1e-3), a label is outside 0 ... C-1, a user is null, or a candidate set has two users.
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
    label_codes = _read_labels(labels, n, classes)
    user_codes = np.zeros(n, dtype=np.int64) if users is None else _encode(users, n, "users")
    if candidate_sets is None:
        return Targets(label_codes, probabilities, user_codes, int(user_codes.max()) + 1, None)
    set_codes = _encode(candidate_sets, n, "candidate_sets")
    first = np.zeros(set_codes.max() + 1, dtype=np.int64)
    first[set_codes[::-1]] = user_codes[::-1]  # of the set's first row, which is written last
    shared = user_codes != first[set_codes]
    _refuse(shared, "a candidate set belongs to one user", np.asarray(candidate_sets), "give each set its own id")
    return Targets(label_codes, probabilities, user_codes, int(user_codes.max()) + 1, set_codes)


def _read_labels(labels: ArrayLike, n: int, classes: int) -> NDArray[np.int64]:
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


def _encode(ids: ArrayLike, n: int, what: str) -> NDArray[np.int64]:
    """Codes [n] of ids, in the order of the sorted ids."""
    ids = np.asarray(ids)
    if ids.shape != (n,):
        raise DataError(f"{what} must be [{n}] to match the probabilities, got shape {ids.shape}: give one a target")
    null = np.array([_is_null(value) for value in ids]) if ids.dtype == object else ids != ids
    _refuse(null, f"{what} must not be null", ids, "drop or name these targets")
    try:
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        raise DataError(f"{what} must be of one type, got a mixture ({error}): convert them to strings") from error


def _is_null(value: object) -> bool:
    """Whether a value is None, NaN, NaT or pandas' NA, whose comparison has no truth value."""
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
