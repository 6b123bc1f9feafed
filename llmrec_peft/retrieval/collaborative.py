"""The collaborative models by name, and those that an index is fitted with by default."""

from __future__ import annotations

from llmrec_peft.retrieval.collaborative_model import CollaborativeModel
from llmrec_peft.retrieval.cooccurrence import ItemCooccurrence
from llmrec_peft.retrieval.factor_models import LabelFactors, MatrixFactorisation
from llmrec_peft.retrieval.popularity import Popularity
from llmrec_peft.retrieval.rates import UserItemRates

_KINDS: tuple[type[CollaborativeModel], ...] = (
    Popularity, ItemCooccurrence, MatrixFactorisation, LabelFactors, UserItemRates,
)  # fmt: skip
MODELS: dict[str, type[CollaborativeModel]] = {kind.NAME: kind for kind in _KINDS}
"""All models by name."""


def default_models(half_life: float | None, *, with_negatives: bool, seed: int = 0) -> list[CollaborativeModel]:
    """Unfitted models with default settings; LabelFactors only where the log has negatives, which it learns from."""
    models = [Popularity(half_life), ItemCooccurrence(), MatrixFactorisation(seed=seed), UserItemRates()]
    return [*models, LabelFactors(seed=seed)] if with_negatives else models
