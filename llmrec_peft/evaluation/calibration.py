"""Calibration: a temperature and one additive bias a class, between the logits and the probabilities.

    p = softmax(logits / temperature + bias)

The temperature (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) mends over- and underconfidence and
leaves the order of two classes' answers as it is. The bias mends a class share that training changed on purpose:
sampled negatives, class weights, or a prior that has moved (Elkan, "The Foundations of Cost-Sensitive Learning", IJCAI
2001).

Fit on validation only: a temperature that has seen the test set makes the test's logloss a training loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

from llmrec_peft.errors import DataError
from llmrec_peft.probabilities import calibrated, read_calibration

# A validation set that is ranked without a fault has its best temperature at 0: the bounds keep answers finite.
# Both, and the fitted biases' bound, lie inside of what a bundle may hold (`probabilities.read_calibration`).
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MAX_FITTED_BIAS = 30.0

# What is believed before any target is seen: log temperature and biases are normal around 0 with these deviations. So
# a few targets move them little, and thousands as far as the data say.
SPREAD_LOG_TEMPERATURE, SPREAD_BIAS = 1.0, 3.0


@dataclass(frozen=True)
class Calibration:
    """Temperature (> 0) and bias (one a class, added after the division). The default changes nothing but softmax."""

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities float64 [n, C] of logits [n, C].

        Raises DataError if C is not the number of biases, and ModelError for logits that are not finite.
        """
        self._check_width(np.asarray(logits))
        return calibrated(logits, self.temperature, self.bias)

    def shift(self, logits: np.ndarray) -> np.ndarray:
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

    def to_dict(self) -> dict:
        """Plain mapping for JSON."""
        return {"temperature": self.temperature, "bias": None if self.bias is None else list(self.bias)}

    @classmethod
    def from_dict(cls, mapping: Mapping | None) -> "Calibration":
        """Read back `to_dict`; None gives the calibration that changes nothing. Raises BundleError out of bounds."""
        return cls(*read_calibration(mapping, None, "bundle"))


def fit_temperature(logits, labels) -> float:
    """The temperature that minimises the logloss of softmax(logits / T), between 0.05 and 20.

    logits: float [n, C]; labels: int [n]. Raises DataError on NaN logits, or labels that do not fit.
    """
    logits, labels = _read(logits, labels)

    def loss(log_inverse: float) -> float:
        return _logloss(logits * math.exp(log_inverse), labels)

    # Logloss is convex in 1/T, hence has one valley in log(1/T).
    found = minimize_scalar(
        loss, bounds=(-math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)), method="bounded", options={"xatol": 1e-8}
    )
    return 1.0 if loss(0.0) <= found.fun else math.exp(-found.x)


def sampling_bias(rates: Sequence[float]) -> tuple[float, ...]:
    """Biases that undo sampling in training: class c was kept with rate rates[c] in (0, 1], so its bias is -log(rate).

    With every positive kept and one negative in ten, rates = (0.1, 1.0) in class order.
    """
    rates = _positive(rates, "sampling rates")
    return _centred(-np.log(rates))


def prior_bias(trained: Sequence[float], prior: Sequence[float]) -> tuple[float, ...]:
    """Biases that move the class shares seen in training to the prior: log(prior / trained), centred on 0."""
    trained, prior = _positive(trained, "class shares of training"), _positive(prior, "prior class shares")
    if len(trained) != len(prior):
        raise DataError(f"prior has {len(prior)} classes, training has {len(trained)}: give one share a class")
    return _centred(np.log(prior / prior.sum()) - np.log(trained / trained.sum()))


def fit_calibration(logits, labels, prior: Sequence[float] | None = None) -> Calibration:
    """Temperature and bias that explain held-out targets best: least logloss, with a weak pull to no calibration.

    logits: float [n, C]; labels: int [n], both of validation. prior: the class shares of the traffic to come, one a
    class, if they differ from those of `labels`, such as after sampled negatives; the fitted bias is then moved there.
    Where validation lacks a class, nothing is known of its share, and the calibration that changes nothing is returned.
    """
    logits, labels = _read(logits, labels)
    counts = np.bincount(labels, minlength=logits.shape[1])
    shift = np.zeros(len(counts)) if prior is None else np.asarray(prior_bias(np.maximum(counts, 0.5), prior))
    if (counts == 0).any():
        return Calibration()
    temperature, bias = _fit_both(logits, labels)
    return Calibration(float(temperature), _centred(bias + shift))


def _fit_both(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The most probable 1/T and biases under SPREAD_*, that is of the mean logloss plus the pull over n."""
    n, classes = logits.shape
    truth = np.eye(classes)[labels]
    pull_scale, pull_bias = 1 / (2 * n * SPREAD_LOG_TEMPERATURE**2), 1 / (2 * n * SPREAD_BIAS**2)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = x[0], x[1:]
        log_p = log_softmax(logits * scale + bias, axis=1)
        error = (np.exp(log_p) - truth) / n
        value = -(log_p * truth).sum() / n + pull_scale * math.log(scale) ** 2 + pull_bias * (bias**2).sum()
        slope = (error * logits).sum() + 2 * pull_scale * math.log(scale) / scale
        return value, np.r_[slope, error.sum(axis=0) + 2 * pull_bias * bias]

    bounds = [(1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE)] + [(-MAX_FITTED_BIAS, MAX_FITTED_BIAS)] * classes
    found = minimize(loss, np.r_[1.0, np.zeros(classes)], jac=True, bounds=bounds, method="L-BFGS-B")
    return 1 / found.x[0], found.x[1:]


def _logloss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def _centred(bias: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in bias - bias.mean())


def _positive(values: Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all() or (array <= 0).any():
        raise DataError(f"{what} must be one finite number > 0 a class, got {values!r}: check the order of classes")
    return array


def _read(logits, labels) -> tuple[np.ndarray, np.ndarray]:
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
