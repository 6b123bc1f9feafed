"""Fusion: the LLM's answer moved by what collaborative models say, as far as validation shows that it helps.

The LLM's logits give the log-odds of the positive classes against the others,

    z = logsumexp(logits of positive classes) - logsumexp(logits of the others)

and fusion adds a linear correction to them:

    z' = z + b + w . [f, z * g, f * g, g, z]

f: collaborative scores; g: how much is known, log(1 + events of the user) and log(1 + training rows of the item); all
standardised by validation and held within the range seen there. The products let the weight of each score depend on
what is known: text alone says most of a new item, counts say most of an old one. Inside the positive classes, and
inside the others, the shares stay the LLM's; so a domain of C labels is fused as one of two.

w has a normal prior around 0, so that what is not learnt leaves the LLM's answer as it is. The prior's width is chosen
by cross-validation over users inside validation, and "no correction" is one of the choices. Test rows have no part.
This is stacking (Wolpert 1992; level-1 logistic regression of Ting & Witten 1999), with the LLM's log-odds as offset,
which scikit-learn's LogisticRegression does not take: it would pull the LLM's own weight to 0 and not to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp

from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.probabilities import checked

GATES = ("log_user_events", "log_item_rows")
"""Features that every fusion has: how much is known of the user and of the item."""

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Precisions of the prior that cross-validation tries; "no correction" is tried too."""

MIN_TARGETS, MIN_USERS, MIN_OF_CLASS = 100, 5, 10
"""Fewer validation targets, users, or targets of one kind fit no fusion."""

FOLDS = 5


@dataclass(frozen=True)
class Features:
    """Collaborative features of n targets: `values` float64 [n, F], columns `names`, GATES last; NaN where unknown."""

    names: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names) or self.names[-2:] != GATES:
            raise DataError(
                f"features must be [n, {len(self.names)}] with {', '.join(GATES)} last, got {self.values.shape} with "
                f"{', '.join(self.names)}; take them from Evidence.features"
            )


@dataclass(frozen=True)
class Fusion:
    """A fitted fusion, or one that leaves the LLM's answers alone (`strength` None).

    positive: which classes are positive, in class order. names: the features. centre, scale, low, high: of z and each
    feature, [1 + F]; low and high are of standardised values. weights: [columns], of the correction; bias: b.
    loss, loss_alone: logloss a validation target, cross-validated with the correction and without; None if not fitted.
    why: what was chosen, in words.
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
        llm_logits: np.ndarray,
        features: Features,
        labels: np.ndarray,
        users: np.ndarray,
        *,
        positive: Sequence[bool] | None = None,
        seed: int = 0,
    ) -> Fusion:
        """Fit on the validation targets; targets with a NaN feature are left out.

        Args:
            llm_logits: float [n, C], as the scorer would give them to `apply` (calibrated, if it calibrates).
            features: of the same targets, from models fitted on training rows and histories strictly before each.
            labels: int [n], class numbers. users: [n], ids; folds never part a user.
            positive: which classes are positive; all but the first if not given.
            seed: of the folds.

        Raises:
            DataError: arrays that do not match, logits that are not finite, labels outside the classes.
        """
        logits, labels, users = _read(llm_logits, features, labels, users)
        positive = _positive(positive, logits.shape[1])
        known = np.isfinite(features.values).all(axis=1)
        z, values = log_odds(logits[known], positive), features.values[known]
        truth, users = np.asarray(positive)[labels[known]].astype(np.float64), users[known]
        count, people = len(z), len(np.unique(users))
        raw = np.column_stack([z, values])
        none = cls._none(positive, features.names, count, people)
        rarer = int(min(truth.sum(), count - truth.sum())) if count else 0
        if count < MIN_TARGETS or people < MIN_USERS or rarer < MIN_OF_CLASS:
            return replace(none, why=f"not fitted: {count} targets of {people} users, {rarer} of the rarer kind")
        columns, frame = _standardise(raw)
        losses = _cross_validate(z, columns, truth, users, seed)
        alone = _logloss(z, truth)
        strength, loss = min(losses.items(), key=lambda pair: pair[1])
        if loss >= alone:
            return replace(
                none, loss=loss, loss_alone=alone, why="no correction beat the LLM alone in cross-validation"
            )
        bias, weights = _solve(z, columns, truth, strength)
        return replace(
            none, **frame, weights=tuple(weights.tolist()), bias=bias, strength=strength, loss=loss, loss_alone=alone,
            why=f"prior of precision {strength:g}, by cross-validation over users",
        )  # fmt: skip

    @classmethod
    def _none(cls, positive: tuple[bool, ...], names: tuple[str, ...], targets: int, users: int) -> Fusion:
        size = 1 + len(names)
        zeros, ones = (0.0,) * size, (1.0,) * size
        return cls(positive, names, zeros, ones, zeros, zeros, (0.0,) * _width(len(names)), 0.0, None, targets, users,
                   None, None, "")  # fmt: skip

    def apply(self, llm_logits: np.ndarray, features: Features | None) -> np.ndarray:
        """Probabilities float64 [n, C] in class order.

        A target without features (`None`, or a NaN in its row) gets the LLM's own answer, softmax(logits), and so does
        every target if nothing was fitted.

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
        known = np.flatnonzero(np.isfinite(features.values).all(axis=1) & np.isfinite(logits).all(axis=1))
        z = log_odds(logits[known], self.positive)
        columns = _columns(np.column_stack([z, features.values[known]]), self._frame())
        moved = z + self.bias + columns @ np.asarray(self.weights)
        # log p of a class is the log of its side's share plus that of its own share inside the side.
        side = np.asarray(self.positive)
        before, after = (
            np.where(side, _log_share(z)[:, None], _log_share(-z)[:, None]),
            np.where(side, _log_share(moved)[:, None], _log_share(-moved)[:, None]),
        )
        log_p[known] += after - before
        found = np.exp(log_p)
        checked(found[known])
        return found

    def _frame(self) -> dict[str, tuple[float, ...]]:
        return {name: getattr(self, name) for name in ("centre", "scale", "low", "high")}

    def to_dict(self) -> dict:
        """Plain JSON numbers, strings and lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, mapping: Mapping) -> Fusion:
        """Read back `to_dict`. Raises BundleError for what it cannot have written."""
        try:
            if set(mapping) != set(cls.__dataclass_fields__):
                raise ValueError("other keys")
            found = {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}
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
        if lengths != {size} or len(self.weights) != _width(len(self.names)) or self.names[-2:] != GATES:
            raise ValueError(
                f"{len(self.names)} features, but {sorted(lengths)} scales and {len(self.weights)} weights"
            )
        numbers = [*self.weights, self.bias, *(value for part in self._frame().values() for value in part)]
        numbers += [value for value in (self.strength, self.loss, self.loss_alone) if value is not None]
        sound = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
        if not sound or not all(map(math.isfinite, numbers)) or min(self.scale) <= 0:
            raise ValueError("a number is missing, not finite, or a scale not above 0")


def log_odds(logits: np.ndarray, positive: Sequence[bool]) -> np.ndarray:
    """z [n]: log-odds of the positive classes against the others, of logits [n, C]."""
    side = np.asarray(positive, bool)
    return logsumexp(logits[:, side], axis=1) - logsumexp(logits[:, ~side], axis=1)


def _width(features: int) -> int:
    """Columns of the correction: z and all features, and the products of z and the scores with each gate."""
    return 1 + features + 2 * (1 + features - 2)


def _standardise(raw: np.ndarray) -> tuple[np.ndarray, dict[str, tuple[float, ...]]]:
    """Columns of the correction for raw [n, 1 + F] (z first, gates last), and the frame that `_columns` needs."""
    centre, scale = raw.mean(axis=0), raw.std(axis=0)
    scale = np.where(scale > 1e-9 * (1 + np.abs(centre)), scale, 1.0)
    standard = (raw - centre) / scale
    parts = {"centre": centre, "scale": scale, "low": standard.min(axis=0), "high": standard.max(axis=0)}
    frame = {name: tuple(value.tolist()) for name, value in parts.items()}
    return _columns(raw, frame), frame


def _columns(raw: np.ndarray, frame: Mapping[str, tuple[float, ...]]) -> np.ndarray:
    centre, scale, low, high = (np.asarray(frame[name]) for name in ("centre", "scale", "low", "high"))
    standard = np.clip((raw - centre) / scale, low, high)
    scores, gates = standard[:, :-2], standard[:, -2:]
    return np.column_stack([standard, scores * gates[:, :1], scores * gates[:, 1:]])


def _solve(z: np.ndarray, columns: np.ndarray, truth: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
    """b and w of the most probable correction: least sum of logloss + strength / 2 |w|^2 (b shares the prior)."""
    design = np.column_stack([np.ones(len(z)), columns])

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        logit = z + design @ x
        value = np.logaddexp(0, logit).sum() - truth @ logit + strength / 2 * x @ x
        return value, design.T @ (expit(logit) - truth) + strength * x

    found = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return float(found.x[0]), found.x[1:]


def _cross_validate(z, columns, truth, users, seed: int) -> dict[float, float]:
    """Logloss a target of each strength, on users that the correction was not fitted on."""
    names, codes = np.unique(users, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[codes]
    sums = dict.fromkeys(STRENGTHS, 0.0)
    for number in range(FOLDS):
        held = fold == number
        for strength in STRENGTHS:
            bias, weights = _solve(z[~held], columns[~held], truth[~held], strength)
            sums[strength] += _logloss(z[held] + bias + columns[held] @ weights, truth[held]) * held.sum()
    return {strength: float(value / len(z)) for strength, value in sums.items()}


def _logloss(logit: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0, logit) - truth * logit))


def _log_share(logit: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -logit)


def _positive(positive: Sequence[bool] | None, classes: int) -> tuple[bool, ...]:
    found = (False,) + (True,) * (classes - 1) if positive is None else tuple(positive)
    if len(found) != classes or not all(isinstance(value, bool | np.bool_) for value in found) or len(set(found)) < 2:
        raise DataError(
            f"fusion: positive must be true or false for each of {classes} classes, and both must occur, got {found}; "
            "name the classes that mean yes"
        )
    return tuple(bool(value) for value in found)


def _read(logits, features: Features, labels, users) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
