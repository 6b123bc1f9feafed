"""Calibration: a temperature and one additive bias a class, between the logits and the probabilities.

    p = softmax(logits / temperature + bias)

The temperature (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) corrects over- and underconfidence
and does not change the ranking of targets of two classes. The bias corrects class shares that training changed on
purpose: by sampled negatives, class weights, or a shifted prior (Elkan, "The Foundations of Cost-Sensitive Learning",
IJCAI 2001).

Fit on validation only: with a temperature that was fitted on the test set, the test's logloss is a training loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

from llmrec_peft.errors import DataError
from llmrec_peft.probabilities import calibrated, read_calibration

# A validation set that is ranked perfectly has its best temperature at 0: the bounds keep probabilities off 0 and 1.
# All bounds lie inside those of a bundle (`probabilities.read_calibration`).
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MAX_FITTED_BIAS = 30.0

# Standard deviations of the normal priors around 0 of log temperature and biases. A few targets move them little, and
# thousands as far as the data require.
SPREAD_LOG_TEMPERATURE, SPREAD_BIAS = 1.0, 3.0


@dataclass(frozen=True)
class Calibration:
    """Temperature (> 0) and bias (one a class, added after the division). The default changes nothing but softmax."""

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    def apply(self, logits: np.ndarray) -> NDArray[np.float64]:
        """Probabilities float64 [n, C] of logits [n, C].

        Raises DataError if C is not the number of biases, and ModelError for logits that are not finite.
        """
        self._check_width(np.asarray(logits))
        return calibrated(logits, self.temperature, self.bias)

    def shift(self, logits: np.ndarray) -> NDArray[np.float64]:
        """Calibrated logits float64 [n, C], before the softmax."""
        logits = np.asarray(logits, dtype=np.float64)
        self._check_width(logits)
        return logits / self.temperature + (0.0 if self.bias is None else np.asarray(self.bias))

    def _check_width(self, logits: np.ndarray) -> None:
        if self.bias is not None and (logits.ndim != 2 or logits.shape[1] != len(self.bias)):
            raise DataError(
                f"calibration has {len(self.bias)} classes, got logits of shape {logits.shape}: "
                "use the calibration that was fitted with this head"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {"temperature": self.temperature, "bias": None if self.bias is None else list(self.bias)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any] | None) -> Calibration:
        """Read back `to_dict`; None gives the calibration that changes nothing. Raises BundleError out of bounds."""
        return cls(*read_calibration(mapping, None, "bundle"))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature that minimises the logloss of softmax(logits / T), between 0.05 and 20.

    logits: float [n, C]; labels: int [n]. Raises DataError on NaN logits, or labels that do not fit.
    """
    scores, classes = _read(logits, labels)

    def loss(log_inverse: float) -> float:
        return _logloss(scores * math.exp(log_inverse), classes)

    # Logloss is convex in 1/T, so it has one minimum in log(1/T).
    found = minimize_scalar(
        loss, bounds=(-math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)), method="bounded", options={"xatol": 1e-8}
    )
    return 1.0 if loss(0.0) <= found.fun else math.exp(-found.x)


def sampling_bias(rates: Sequence[float]) -> tuple[float, ...]:
    """Biases that undo sampling in training: class c was kept with rate rates[c] in (0, 1], so its bias is -log(rate).

    With every positive kept and one negative in ten, rates = (0.1, 1.0) in class order.
    """
    return _centred(-np.log(_positive(rates, "sampling rates")))


def prior_bias(trained: Sequence[float], prior: Sequence[float]) -> tuple[float, ...]:
    """Biases that move the class shares seen in training to the prior: log(prior / trained), centred on 0."""
    old, new = _positive(trained, "class shares of training"), _positive(prior, "prior class shares")
    if len(old) != len(new):
        raise DataError(f"prior has {len(new)} classes, training has {len(old)}: give one share a class")
    # Softmax ignores a constant, so biases are centred on 0.
    return _centred(np.log(new / new.sum()) - np.log(old / old.sum()))


def fit_calibration(logits: ArrayLike, labels: ArrayLike, prior: Sequence[float] | None = None) -> Calibration:
    """Temperature and bias that minimise the logloss of held-out targets, weakly regularised to no calibration.

    Where validation lacks a class, its share is unknown, and the calibration that changes nothing is returned.

    Args:
        logits: float [n, C], of validation.
        labels: int [n], of validation.
        prior: class shares of the traffic to come, one a class, where they differ from those of `labels`, such as
            after sampled negatives; the fitted bias is then moved there.
    """
    scores, classes = _read(logits, labels)
    counts = np.bincount(classes, minlength=scores.shape[1])
    trained = np.maximum(counts, 0.5).tolist()
    shift = np.zeros(len(counts)) if prior is None else np.asarray(prior_bias(trained, prior))
    if (counts == 0).any():
        return Calibration()
    temperature, bias = _fit_both(scores, classes)
    return Calibration(float(temperature), _centred(bias + shift))


def _fit_both(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Maximum a posteriori T and biases [C] under the priors SPREAD_*.

    Minimises over s = 1/T and b, with the sigmas of the priors,

        mean logloss(s * logits + b) + (log(s)^2 / (2 sigma_T^2) + |b|^2 / (2 sigma_b^2)) / n
    """
    n, classes = logits.shape
    truth = np.eye(classes)[labels]  # [n, C], one-hot
    weight_scale, weight_bias = 1 / (2 * n * SPREAD_LOG_TEMPERATURE**2), 1 / (2 * n * SPREAD_BIAS**2)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = x[0], x[1:]
        log_p = log_softmax(logits * scale + bias, axis=1)
        error = (np.exp(log_p) - truth) / n
        value = -(log_p * truth).sum() / n + weight_scale * math.log(scale) ** 2 + weight_bias * (bias**2).sum()
        # d loss / d scale; that of the biases is the column sum of the error.
        slope = (error * logits).sum() + 2 * weight_scale * math.log(scale) / scale
        return value, np.r_[slope, error.sum(axis=0) + 2 * weight_bias * bias]

    bounds = [(1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE)] + [(-MAX_FITTED_BIAS, MAX_FITTED_BIAS)] * classes
    found = minimize(loss, np.r_[1.0, np.zeros(classes)], jac=True, bounds=bounds, method="L-BFGS-B")
    return 1 / found.x[0], found.x[1:]  # fitted as 1/T, in which the loss is convex


def _logloss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def _centred(bias: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in bias - bias.mean())


def _positive(values: Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all() or (array <= 0).any():
        raise DataError(f"{what} must be one finite number > 0 a class, got {values!r}: check the order of classes")
    return array


def _read(logits: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Checked logits [n, C] and labels [n]."""
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) == 0 or labels.shape != (len(logits),):
        raise DataError(
            f"calibration needs logits [n, classes] and labels [n], got {logits.shape} and {labels.shape}: "
            "pass the validation targets"
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise DataError(f"logits must be finite, but {bad} of {len(logits)} rows are not: look for a diverged training")
    codes = labels.astype(np.int64)
    if (codes != labels).any() or codes.min() < 0 or codes.max() >= logits.shape[1]:
        raise DataError(
            f"labels must be whole numbers from 0 to {logits.shape[1] - 1}, got {labels.min()} to {labels.max()}: "
            "check the domain's outcomes"
        )
    return logits, codes
