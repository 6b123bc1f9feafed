"""Matrix factorisation: item vectors by alternating least squares, user vectors folded in from histories."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.baselines import STRENGTH
from llmrec_peft.retrieval.collaborative_model import Arrays, CollaborativeModel, pairs_by_user
from llmrec_peft.retrieval.histories import Histories, user_items
from llmrec_peft.retrieval.item_codes import Codes, is_known
from llmrec_peft.retrieval.least_squares import FixedSide, Regularisation, als_item_vectors, half_step
from llmrec_peft.retrieval.rates import UserItemRates


class FactorModel(CollaborativeModel):
    """Item vectors y_i [rank]; a user's vector x_u is folded in from a history by the half-step of training.

    score(u, i) = x_u . y_i
    """

    ARRAYS: ClassVar[dict[str, str]] = {"factors": "items", "gram": "total", "known": "total"}

    # Fields of the subclasses, in an order of their own.
    rank: int
    rounds: int
    seed: int

    @property
    @abstractmethod
    def _regularisation(self) -> Regularisation: ...

    @abstractmethod
    def _targets(self, histories: Histories) -> sp.csr_matrix:
        """The matrix [u, num_items] that user vectors are fitted to; entries only at items that have a vector."""

    @cached_property
    def side(self) -> FixedSide:
        """The items' vectors as half-steps take them."""
        return FixedSide(self.arrays["factors"], self.arrays["gram"], int(self.arrays["known"][0]))

    def _vectors(self, matrix: sp.csr_matrix) -> Arrays:
        """Fit item vectors to a matrix [users, items].

        Sums over all items (gram, known) are stored too, so that a changed item table changes no user's vector.
        """
        side = FixedSide(als_item_vectors(matrix, self.rank, self.rounds, self._regularisation, self.seed))
        return {"factors": side.vectors, "gram": side.gram, "known": np.array([side.num_known], np.int64)}

    def has_valid_arrays(self, num_items: int) -> bool:
        shapes = [self.arrays[name].shape for name in ("factors", "gram", "known")]
        return super().has_valid_arrays(num_items) and shapes == [
            (num_items, self.rank), (self.rank, self.rank), (1,)
        ]  # fmt: skip

    def fold_in(self, histories: Histories) -> NDArray[np.float32]:
        """Vectors of users, float32 [u, rank]; zeros for a user without known items."""
        known = is_known(histories.items, self.num_items)
        # In the table, but without a vector: such an item would only count in the penalty.
        known[known] = self.side.known[histories.items[known]]
        return half_step(self._targets(histories.where(known)), self.side, self._regularisation)

    def score_all(self, histories: Histories) -> np.ndarray:
        users = self.fold_in(histories)
        scores = users @ self.side.vectors.T
        # Zero vectors score 0, which must not rank above a negative score.
        scores[:, ~self.side.known] = -np.inf
        scores[~users.any(axis=1)] = -np.inf
        return scores

    def score_pairs(self, histories: Histories, owners: Codes, candidates: Codes) -> np.ndarray:
        result = np.zeros(len(candidates))
        for users, pairs in pairs_by_user(histories, owners, self.BLOCK_SIZE // self.side.rank):
            vectors = self.fold_in(histories.part(users.start, users.stop))
            # Gathered item vectors [pairs, rank] stay below BLOCK_SIZE numbers.
            for part in np.array_split(pairs, 1 + len(pairs) * self.side.rank // self.BLOCK_SIZE):
                items = self._item("factors", candidates[part])
                result[part] = np.einsum("nd,nd->n", vectors[owners[part] - users.start], items)
        return result


@dataclass
class MatrixFactorisation(FactorModel):
    """Implicit matrix factorisation (iALS) of the positives: Hu, Koren & Volinsky, ICDM 2008.

        minimise  sum over positive pairs (1 - x_u.y_i)^2 + background * sum over all pairs (x_u.y_i)^2 + penalty

    The score is near 1 for items that the user would take and near 0 for others. `least_squares` has the penalty.
    """

    NAME: ClassVar[str] = "factors"

    rank: int = 64
    background: float = 0.4
    """Weight of an item that the user did not take; an item that was taken has 1 + background."""
    strength: float = 0.005
    rounds: int = 10
    seed: int = 0

    def _check(self) -> None:
        if min(self.rank, self.rounds) < 1 or not (self.background > 0 and self.strength > 0):
            raise ConfigError(f"{self.NAME}: rank and rounds must be 1 or more, weights above 0, got {self.settings()}")

    @property
    def _regularisation(self) -> Regularisation:
        return Regularisation(self.background, self.strength)

    def _fit(self, log: BehaviorLog, rows: Codes, positive: NDArray[np.bool_]) -> Arrays:
        taken = rows[positive]
        shape = (log.num_users, log.num_items)
        matrix = user_items(log.user_codes[taken], log.item_codes[taken], np.ones(len(taken), bool), shape)
        return self._vectors(matrix)

    def _targets(self, histories: Histories) -> sp.csr_matrix:
        return histories.positives().matrix(self.num_items)


@dataclass
class LabelFactors(FactorModel):
    """Matrix factorisation of what user and item rates leave unexplained of the labels (Zhou et al., AAIM 2008).

        minimise  sum over labelled pairs (label - item rate - user rate - x_u.y_i)^2 + penalty

    The score is the label's expected distance from the sum of both rates, in probability. On a log of positives alone
    it is near 0 for all pairs. This model retrieves nothing: that a user would like an item does not mean that the
    user meets it.
    """

    NAME: ClassVar[str] = "label_factors"
    ARRAYS: ClassVar[dict[str, str]] = {**FactorModel.ARRAYS, "rate": "items", "overall": "total"}

    rank: int = 16
    strength: float = 0.1
    rounds: int = 10
    seed: int = 0

    def _check(self) -> None:
        if min(self.rank, self.rounds) < 1 or not self.strength > 0:
            raise ConfigError(f"{self.NAME}: rank and rounds must be 1 or more, strength above 0: {self.settings()}")

    @property
    def _regularisation(self) -> Regularisation:
        return Regularisation(0.0, self.strength)

    def _fit(self, log: BehaviorLog, rows: Codes, positive: NDArray[np.bool_]) -> Arrays:
        rates = UserItemRates()
        rates.set_arrays(rates._fit(log, rows, positive))
        self.arrays = {"rate": rates.item_rates() - rates.overall, "overall": np.array([rates.overall])}
        matrix = self._residuals(Histories.from_rows(log, rows, positive), log.num_items)
        return self._vectors(matrix) | self.arrays

    def _residuals(self, histories: Histories, num_items: int) -> sp.csr_matrix:
        """Label minus item and user rate for each pair met, [u, num_items]."""
        matrix = histories.matrix(num_items)
        counts = np.diff(matrix.indptr)
        overall = self.arrays["overall"][0]
        # Per entry, [entries]: label - item rate.
        rest = matrix.data - overall - self.arrays["rate"][matrix.indices]
        # The user's rate is its distance from what its items lead one to expect, smoothed towards 0. The added 0.0
        # gives `reduceat` an index for users at the end without events.
        user = np.add.reduceat(np.r_[rest, 0.0], np.minimum(matrix.indptr[:-1], len(rest)))
        user = np.where(counts > 0, user, 0.0) / (counts + STRENGTH)
        matrix.data = (rest - np.repeat(user, counts)).astype(np.float32)
        return matrix

    def _targets(self, histories: Histories) -> sp.csr_matrix:
        return self._residuals(histories, self.num_items)

    def score_all(self, histories: Histories) -> np.ndarray:
        return np.broadcast_to(np.float32(-np.inf), (len(histories), self.num_items))
