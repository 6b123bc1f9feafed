"""Stacking: a logistic regression on collaborative features with the LLM's log-odds as offset.

    z' = z + b + w . columns(z, f, g)

    columns = [standardised z, f, g,  (z, f) * g_1,  (z, f) * g_2]

Standardised values are clipped to the range of the fit. b and w minimise the sum of the logloss + strength / 2 |w|^2,
a normal prior around 0 (b shares it), so coefficients that the data do not support leave z unchanged.

Shapes: n targets, F features, of which the last two are the gates g; z and all features are 1 + F columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Precisions of the prior that cross-validation tries; "no correction" is tried too."""

FOLDS = 5

Frame = Mapping[str, tuple[float, ...]]
"""`centre`, `scale`, `low` and `high`, each [1 + F]: standardisation of z and the features, and its range."""


def log_odds(logits: np.ndarray, positive: Sequence[bool]) -> np.ndarray:
    """z [n]: log-odds of the positive classes against the others, of logits [n, C]."""
    side = np.asarray(positive, bool)
    return logsumexp(logits[:, side], axis=1) - logsumexp(logits[:, ~side], axis=1)


def num_columns(features: int) -> int:
    """Columns of the correction for F features: 1 + F, and the products of z and the F - 2 scores with both gates."""
    return 1 + features + 2 * (1 + features - 2)


def standardise(raw: np.ndarray) -> tuple[np.ndarray, dict[str, tuple[float, ...]]]:
    """Columns of the correction for raw [n, 1 + F] (z first, gates last), and the frame that they are computed in."""
    centre, scale = raw.mean(axis=0), raw.std(axis=0)
    # A constant column has no scale, and rounding may leave one that is not quite 0.
    scale = np.where(scale > 1e-9 * (1 + np.abs(centre)), scale, 1.0)
    standard = (raw - centre) / scale
    parts = {"centre": centre, "scale": scale, "low": standard.min(axis=0), "high": standard.max(axis=0)}
    frame = {name: tuple(value.tolist()) for name, value in parts.items()}
    return correction_columns(raw, frame), frame


def correction_columns(raw: np.ndarray, frame: Frame) -> NDArray[np.float64]:
    """Columns [n, num_columns(F)] of raw [n, 1 + F] in a fitted frame."""
    centre, scale, low, high = (np.asarray(frame[name]) for name in ("centre", "scale", "low", "high"))
    # Outside the range of validation a linear extrapolation is unsupported.
    standard = np.clip((raw - centre) / scale, low, high)
    scores, gates = standard[:, :-2], standard[:, -2:]
    return np.column_stack([standard, scores * gates[:, :1], scores * gates[:, 1:]])


def fit_correction(
    z: np.ndarray, columns: np.ndarray, truth: np.ndarray, strength: float
) -> tuple[float, NDArray[np.float64]]:
    """b and w that minimise  sum of logloss(z + b + columns @ w, truth) + strength / 2 (|w|^2 + b^2)."""
    design = np.column_stack([np.ones(len(z)), columns])  # [n, 1 + columns]; the first weight is b

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        logit = z + design @ x
        value = np.logaddexp(0, logit).sum() - truth @ logit + strength / 2 * x @ x
        return value, design.T @ (expit(logit) - truth) + strength * x  # the objective is convex

    found = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return float(found.x[0]), found.x[1:]


def cross_validate(
    z: np.ndarray, columns: np.ndarray, truth: np.ndarray, users: np.ndarray, seed: int
) -> dict[float, float]:
    """Mean logloss of each strength, on users that the correction was not fitted on. users: [n], ids."""
    # Folds of users: a user's targets are correlated, and would leak between folds of targets.
    names, codes = np.unique(users, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[codes]
    sums = dict.fromkeys(STRENGTHS, 0.0)
    for number in range(FOLDS):
        held_out = fold == number
        for strength in STRENGTHS:
            bias, weights = fit_correction(z[~held_out], columns[~held_out], truth[~held_out], strength)
            logit = z[held_out] + bias + columns[held_out] @ weights
            sums[strength] += binary_logloss(logit, truth[held_out]) * held_out.sum()
    return {strength: float(value / len(z)) for strength, value in sums.items()}


def binary_logloss(logit: np.ndarray, truth: np.ndarray) -> float:
    """Mean of log(1 + exp(logit)) - truth * logit, over [n]; truth is 0.0 or 1.0."""
    return float(np.mean(np.logaddexp(0, logit) - truth * logit))
