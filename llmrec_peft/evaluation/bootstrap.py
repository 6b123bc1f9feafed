"""Confidence intervals by a bootstrap that draws whole users.

Targets of one user are correlated, so intervals that draw targets one by one are too narrow. Here a sample draws as
many users as there are, with replacement, and takes all targets of each (cluster bootstrap; Davison & Hinkley,
*Bootstrap Methods and their Application*, 1997, section 3.8). The interval is the percentile interval. A difference of
two models is paired: both are scored on the same users of each sample.

A drawn user is a weight in the metric's own plan (`metric_plans`), so nothing is copied or sorted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.metrics import check_needs, find_metric
from llmrec_peft.evaluation.targets import Targets, read_targets

# Weights of one chunk of samples, gathered to targets, stay under this many numbers (8 bytes each, a few copies).
CHUNK_NUMBERS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value on all targets and its percentile interval at `level`.

    `samples` were drawn, of which `undefined` had no value and are left out. With one user there is nothing to draw:
    low and high are NaN, and all samples are undefined.
    """

    value: float
    low: float
    high: float
    level: float
    samples: int
    undefined: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)


def intervals(
    names: Sequence[str],
    labels: ArrayLike,
    probabilities: ArrayLike,
    users: ArrayLike,
    candidate_sets: ArrayLike | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Intervals of several metrics over the same samples; arrays as in `metrics.compute_metrics`.

    Raises ConfigError for a bad name, samples or level, DataError for bad arrays.
    """
    _check(names, users, candidate_sets)
    targets = read_targets(labels, probabilities, users, candidate_sets)
    drawn = _draws(names, [targets], samples, seed, level)
    return {name: _interval(values[0], level) for name, values in drawn.items()}


def differences(
    names: Sequence[str],
    labels: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    users: ArrayLike,
    candidate_sets: ArrayLike | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Paired intervals of `metric(after) - metric(before)` over the same samples of users.

    before, after: probabilities [n, C] of two models on the same targets.
    """
    _check(names, users, candidate_sets)
    pair = [read_targets(labels, probabilities, users, candidate_sets) for probabilities in (before, after)]
    drawn = _draws(names, pair, samples, seed, level)
    return {name: _interval(values[1] - values[0], level) for name, values in drawn.items()}


def mean_interval(
    values: ArrayLike, users: ArrayLike, *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The interval of the mean of values [n], such as metrics of candidate sets, of users [n] (ids).

    With `values` the differences of two systems on the same sets, it is their paired interval; the same seed draws the
    same users. `samples` 0 gives the mean alone.

    Raises DataError for arrays that do not match or no value, ConfigError for bad samples or level.
    """
    values, users = np.asarray(values, np.float64), np.asarray(users)
    if values.ndim != 1 or users.shape != values.shape or not len(values):
        raise DataError(
            f"a mean needs values [n] and users [n], n at least 1, got {values.shape} and {users.shape}: "
            "give one user per value"
        )
    if samples < 0 or not 0 < level < 1:
        raise ConfigError(f"bootstrap needs samples >= 0 and 0 < level < 1, got {samples} and {level}: change them")
    # [U, 2]: sum of values and number of values; a sample's mean is the ratio of its weighted sums.
    codes = np.unique(users, return_inverse=True)[1]
    sums = np.stack([np.bincount(codes, values), np.bincount(codes)], axis=1)
    count = len(sums)
    drawn = np.full(1 + samples, np.nan)
    drawn[0] = values.mean()
    rng, chunk = np.random.default_rng(seed), max(1, CHUNK_NUMBERS // count)
    # With one user every sample is the whole again, and the interval would falsely have no width.
    for start in range(0, samples if count > 1 else 0, chunk):
        size = min(chunk, samples - start)
        top, bottom = (_weights(rng, count, size) @ sums).T
        drawn[1 + start : 1 + start + size] = top / bottom
    return _interval(drawn, level)


def _check(names: Sequence[str], users: ArrayLike | None, candidate_sets: ArrayLike | None) -> None:
    if users is None:
        raise DataError("the bootstrap draws users, got none: pass users=ids, one a target")
    check_needs(names, users, candidate_sets)


def _draws(
    names: Sequence[str], several: list[Targets], samples: int, seed: int, level: float
) -> dict[str, np.ndarray]:
    """Values [models, 1 + samples] by metric; the first column is the value on all targets."""
    if samples < 1 or not 0 < level < 1:
        raise ConfigError(f"bootstrap needs samples >= 1 and 0 < level < 1, got {samples} and {level}: change them")
    plans = {
        name: [metric.plan(targets, at) for targets in several] for name in names for metric, at in [find_metric(name)]
    }
    users = several[0].num_users
    rng = np.random.default_rng(seed)
    # Both models of a pair are evaluated with the same weights.
    values = {name: np.empty((len(several), 1 + samples)) for name in names}
    for name in names:
        values[name][:, 0] = [plan(np.ones((1, users)))[0] for plan in plans[name]]
    if users < 2:  # each sample would be the whole again, and the interval falsely without width
        for name in names:
            values[name][:, 1:] = np.nan
        return values
    chunk = max(1, CHUNK_NUMBERS // max(users, len(several[0].labels)))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        weights = _weights(rng, users, size)
        for name in names:
            for row, plan in enumerate(plans[name]):
                values[name][row, 1 + start : 1 + start + size] = plan(weights)
    return values


def _weights(rng: np.random.Generator, users: int, samples: int) -> NDArray[np.float64]:
    """How often each user is drawn, [samples, users]; each row sums to `users`."""
    # An offset a sample, so that one bincount counts them all.
    drawn = rng.integers(0, users, (samples, users)) + users * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * users).reshape(samples, users).astype(np.float64)


def _interval(values: np.ndarray, level: float) -> Interval:
    drawn = values[1:][~np.isnan(values[1:])]  # values[0] is that on all targets
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (np.nan, np.nan)
    undefined = len(values) - 1 - len(drawn)
    return Interval(float(values[0]), float(low), float(high), level, len(values) - 1, undefined)
