"""Calibrated probabilities and their bounds: the one place that training, scoring and the torch-free server share.

p = softmax(logits / temperature + bias)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from llmrec_peft.errors import BundleError, ModelError

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
"""A temperature outside of these comes from no fit (0.05 to 20), and lets finite logits overflow or vanish."""
MOST_BIAS = 100.0
"""Largest absolute bias of a class: odds of e^100."""


def read_calibration(calibration: Any, labels: int | None, where: str) -> tuple[float, tuple[float, ...] | None]:
    """Temperature and biases of a stored calibration; (1, None), which changes nothing, for None.

    Args:
        calibration: None, or a mapping with `temperature` and, unless null or left out, `bias`, one number a label.
        labels: how many labels there are; None leaves their number unchecked.
        where: what holds it, for the error.

    Raises BundleError for anything else, and for values out of bounds.
    """
    if calibration is None:
        return 1.0, None
    wrong = f"{where}: calibration must have a finite temperature above 0 ({LEAST_TEMPERATURE:g} to "
    wrong += f"{MOST_TEMPERATURE:g}) and finite biases ({-MOST_BIAS:g} to {MOST_BIAS:g}) or null, "
    if not isinstance(calibration, Mapping):
        raise BundleError(f"{wrong}not {str(calibration)[:80]!r}; fit it again, or save the bundle again")
    temperature, bias = calibration.get("temperature"), calibration.get("bias")
    biases = [] if bias is None else bias
    if not (
        _within(temperature, LEAST_TEMPERATURE, MOST_TEMPERATURE)
        and isinstance(biases, list | tuple)
        and all(_within(value, -MOST_BIAS, MOST_BIAS) for value in biases)
    ):
        raise BundleError(f"{wrong}not {str(dict(calibration))[:160]}; fit it again, or save the bundle again")
    if bias is not None and labels is not None and len(bias) != labels:
        raise BundleError(
            f"{where}: calibration has {len(bias)} biases, but {labels} labels; fit it again, or save the bundle again"
        )
    return float(temperature), None if bias is None else tuple(float(value) for value in bias)


def _within(value: object, least: float, most: float) -> TypeGuard[float]:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(least <= value <= most)


def calibrated(logits: np.ndarray, temperature: float, bias: Sequence[float] | None) -> np.ndarray:
    """Probabilities float64 [n, C] of logits [n, C]. Raises ModelError where a logit or a probability is not sound."""
    logits = np.asarray(logits, dtype=np.float64)
    finite = np.isfinite(logits).all(axis=-1)
    if not finite.all():
        row = logits[~finite][0]
        raise ModelError(
            f"logits must be finite numbers, but {int((~finite).sum())} of {len(logits)} rows are not, such as "
            f"{row.tolist()}; look for a diverged training or an overflow in float16"
        )
    values = logits / temperature + (0.0 if bias is None else np.asarray(bias, np.float64))
    values = np.exp(values - values.max(axis=-1, keepdims=True))
    return checked(values / values.sum(axis=-1, keepdims=True))


def checked(probabilities: np.ndarray) -> np.ndarray:
    """The same probabilities [n, C]. Raises ModelError unless each row is finite, at least 0 and sums to 1."""
    sums = probabilities.sum(axis=-1)
    sound = np.isfinite(probabilities).all(axis=-1) & (probabilities >= 0).all(axis=-1) & np.isclose(sums, 1, atol=1e-6)
    if not sound.all():
        raise ModelError(
            f"probabilities must be finite and sum to 1, but {int((~sound).sum())} of {len(sound)} rows do not, such "
            f"as {probabilities[~sound][0].tolist()}; check the calibration and the weights"
        )
    return probabilities
