"""Fusion: a linear correction of the LLM's log-odds by collaborative scores, fitted on validation.

The LLM's logits give the log-odds of the positive classes against the others,

    z = logsumexp(logits of positive classes) - logsumexp(logits of the others)

and fusion adds a linear correction to them:

    z' = z + b + w . [f, z * g, f * g, g, z]

f: collaborative scores. g: gates, log(1 + events of the user) and log(1 + training rows of the item). All are
standardised on validation and clipped to the range seen there. The products let the weight of each score depend on how
much is known: text describes new items best, counts describe items with many rows best. Inside the positive classes,
and inside the others, the shares stay the LLM's, so a domain of C labels is fused as one of two.

w has a normal prior around 0. Cross-validation over users inside validation chooses its width, and "no correction" is
one of the choices, so a correction that does not help leaves the LLM's predictions unchanged. Test rows are not used.
This is stacking (Wolpert 1992; level-1 logistic regression of Ting & Witten 1999) with the LLM's log-odds as offset.
scikit-learn's LogisticRegression takes no offset: its prior would pull the LLM's own weight to 0 and not to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.probabilities import checked
from llmrec_peft.retrieval.pair_features import GATES, Features
from llmrec_peft.retrieval.stacking import (
    binary_logloss,
    correction_columns,
    cross_validate,
    fit_correction,
    log_odds,
    num_columns,
    standardise,
)

MIN_TARGETS, MIN_USERS, MIN_OF_CLASS = 100, 5, 10
"""With fewer validation targets, users, or targets of one class, no correction is fitted."""


@dataclass(frozen=True)
class Fusion:
    """A fitted fusion, or one that leaves the LLM's predictions unchanged (`strength` None).

    Attributes:
        positive: which classes are positive, in class order.
        names: the features.
        centre, scale, low, high: standardisation of z and each feature, [1 + F]; low and high bound the result.
        weights, bias: w [columns] and b of the correction.
        strength: precision of the prior that was chosen; None for no correction.
        targets, users: counts in validation, without targets that have a NaN feature.
        loss, loss_alone: mean logloss on validation, cross-validated, with and without the correction; None if not
            fitted.
        why: reason of the choice, for messages.
    """

    positive: tuple[bool, ...]
    names: tuple[str, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    strength: float | None
    targets: int
    users: int
    loss: float | None
    loss_alone: float | None
    why: str

    @classmethod
    def fit(
        cls,
        llm_logits: ArrayLike,
        features: Features,
        labels: ArrayLike,
        users: ArrayLike,
        *,
        positive: Sequence[bool] | None = None,
        seed: int = 0,
    ) -> Fusion:
        """Fit on the validation targets; targets with a NaN feature are left out.

        Args:
            llm_logits: float [n, C], as the scorer passes them to `apply` (calibrated, if it calibrates).
            features: features of the same targets, from models fitted on training rows and strictly earlier histories.
            labels: int [n], class numbers.
            users: [n], ids; all targets of a user are in one fold.
            positive: which classes are positive; all but the first if not given.
            seed: random seed of the folds.

        Raises:
            DataError: arrays that do not match, logits that are not finite, labels outside the classes.
        """
        logits, classes, owners = _read(llm_logits, features, labels, users)
        sides = _positive(positive, logits.shape[1])
        known = np.isfinite(features.values).all(axis=1)
        z, values = log_odds(logits[known], sides), features.values[known]
        truth, owners = np.asarray(sides)[classes[known]].astype(np.float64), owners[known]
        count, people = len(z), len(np.unique(owners))
        none = cls._none(sides, features.names, count, people)
        rarer = int(min(truth.sum(), count - truth.sum())) if count else 0
        if count < MIN_TARGETS or people < MIN_USERS or rarer < MIN_OF_CLASS:
            return replace(none, why=f"not fitted: {count} targets of {people} users, {rarer} of the rarer kind")
        columns, frame = standardise(np.column_stack([z, values]))
        losses = cross_validate(z, columns, truth, owners, seed)
        # The choice is between out-of-fold losses: z alone was not fitted here, so its loss is out of fold too.
        alone = binary_logloss(z, truth)
        strength, loss = min(losses.items(), key=lambda pair: pair[1])
        if loss >= alone:
            return replace(
                none, loss=loss, loss_alone=alone, why="no correction beat the LLM alone in cross-validation"
            )
        # The chosen strength on all of validation.
        bias, weights = fit_correction(z, columns, truth, strength)
        return replace(
            none, centre=frame["centre"], scale=frame["scale"], low=frame["low"], high=frame["high"],
            weights=tuple(weights.tolist()), bias=bias, strength=strength, loss=loss, loss_alone=alone,
            why=f"prior of precision {strength:g}, by cross-validation over users",
        )  # fmt: skip

    @classmethod
    def _none(cls, positive: tuple[bool, ...], names: tuple[str, ...], targets: int, users: int) -> Fusion:
        size = 1 + len(names)
        zeros, ones = (0.0,) * size, (1.0,) * size
        weights = (0.0,) * num_columns(len(names))
        return cls(positive, names, zeros, ones, zeros, zeros, weights, 0.0, None, targets, users, None, None, "")

    def apply(self, llm_logits: ArrayLike, features: Features | None) -> NDArray[np.float64]:
        """Probabilities float64 [n, C] in class order.

        A target without features (`None`, or a NaN in its row) gets the LLM's own probabilities, softmax(logits), and
        so does every target if nothing was fitted.

        Raises:
            DataError: logits with another number of classes, or features with other names or another length.
            ModelError: weights so large that probabilities of finite logits are not finite.
        """
        logits = np.asarray(llm_logits, np.float64)
        if logits.ndim != 2 or logits.shape[1] != len(self.positive):
            raise DataError(
                f"fusion was fitted for {len(self.positive)} classes, got logits of shape {logits.shape}; "
                "use the one of this domain"
            )
        log_p = log_softmax(logits, axis=1)
        if features is not None and (features.names != self.names or len(features.values) != len(logits)):
            raise DataError(
                f"fusion needs the features {', '.join(self.names)} of {len(logits)} targets, got "
                f"{', '.join(features.names)} of {len(features.values)}; use the models that it was fitted with"
            )
        if features is None or self.strength is None:
            return np.exp(log_p)
        # Rows with a NaN feature keep the LLM's probabilities.
        known = np.flatnonzero(np.isfinite(features.values).all(axis=1) & np.isfinite(logits).all(axis=1))
        z = log_odds(logits[known], self.positive)
        columns = correction_columns(np.column_stack([z, features.values[known]]), self._frame())
        moved = z + self.bias + columns @ np.asarray(self.weights)
        # z and z' are log-odds of the positive side.
        # log p(class) = log p(its side) + log p(class | its side), and the correction changes the first term alone.
        side = np.asarray(self.positive)
        before = np.where(side, _log_sigmoid(z)[:, None], _log_sigmoid(-z)[:, None])
        after = np.where(side, _log_sigmoid(moved)[:, None], _log_sigmoid(-moved)[:, None])
        log_p[known] += after - before
        probabilities = np.exp(log_p)
        checked(probabilities[known])
        return probabilities

    def _frame(self) -> dict[str, tuple[float, ...]]:
        return {name: getattr(self, name) for name in ("centre", "scale", "low", "high")}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON numbers, strings and lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Fusion:
        """Read back `to_dict`. Raises BundleError for what it cannot have written."""
        try:
            if set(mapping) != set(cls.__dataclass_fields__):
                raise ValueError("other keys")
            found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}
            fusion = cls(**found)
            fusion._check()
        except (TypeError, ValueError, KeyError) as error:
            raise BundleError(
                f"fusion is not what Fusion.to_dict writes ({error}); restore the file or fit it again"
            ) from None
        return fusion

    def _check(self) -> None:
        _positive(self.positive, len(self.positive))
        size = 1 + len(self.names)
        lengths = {len(self._frame()[name]) for name in self._frame()}
        if lengths != {size} or len(self.weights) != num_columns(len(self.names)) or self.names[-2:] != GATES:
            raise ValueError(
                f"{len(self.names)} features, but {sorted(lengths)} scales and {len(self.weights)} weights"
            )
        numbers = [*self.weights, self.bias, *(value for part in self._frame().values() for value in part)]
        numbers += [value for value in (self.strength, self.loss, self.loss_alone) if value is not None]
        valid = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
        if not valid or not all(map(math.isfinite, numbers)) or min(self.scale) <= 0:
            raise ValueError("a number is missing, not finite, or a scale not above 0")


def _log_sigmoid(logit: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -logit)


def _positive(positive: Sequence[bool] | None, classes: int) -> tuple[bool, ...]:
    found = (False,) + (True,) * (classes - 1) if positive is None else tuple(positive)
    if len(found) != classes or not all(isinstance(value, bool | np.bool_) for value in found) or len(set(found)) < 2:
        raise DataError(
            f"fusion: positive must be true or false for each of {classes} classes, and both must occur, got {found}; "
            "name the classes that mean yes"
        )
    return tuple(bool(value) for value in found)


def _read(
    logits: ArrayLike, features: Features, labels: ArrayLike, users: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked logits [n, C], labels int64 [n] and users [n]."""
    logits, labels, users = np.asarray(logits, np.float64), np.asarray(labels), np.asarray(users)
    sizes = [len(logits), len(features.values), *labels.shape, *users.shape]
    if logits.ndim != 2 or logits.shape[1] < 2 or len(set(sizes)) != 1 or labels.ndim != 1 or users.ndim != 1:
        raise DataError(
            f"fusion needs logits [n, classes], features [n, F], labels [n] and users [n], got lengths {sizes} and "
            f"logits {logits.shape}; pass the validation targets"
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise DataError(
            f"fusion: {bad} of {len(logits)} targets have logits that are not finite; look for a bad bundle"
        )
    if len(labels) and (labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise DataError(f"fusion: labels must be class numbers 0 to {logits.shape[1] - 1}; check the domain's outcomes")
    return logits, labels.astype(np.int64), users
