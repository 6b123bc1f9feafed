"""Options of evaluation: metrics, calibration, and the ranking of candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrec_peft.evaluation.metrics import find_metric
from llmrec_peft.fields import MAX_COUNT, MAX_SEED, MAX_TOKENS, check_fields, number, require

MAX_SAMPLES = 100_000
"""Maximum number of bootstrap resamples."""


def check_metrics(names: list[str] | None, key: str) -> None:
    """Raise ConfigError unless all metrics exist and at least one is not a count."""
    values = [name for name in names or [] if not find_metric(name)[0].count]
    require(names is None or bool(values), key, "null or a list with a metric other than counts, such as auc", names)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation before and after training."""

    valid_targets: int | None = number(2000, 1, MAX_COUNT)
    """Maximum number of validation targets, in whole streams; null for all."""
    test_targets: int | None = number(2000, 1, MAX_COUNT)
    """Maximum number of test targets, in whole streams; null for all."""
    before: bool = True
    """Evaluate the untrained classifier too."""
    calibrate: bool = True
    """Fit a temperature and one bias per label on validation, and save them in the bundle."""
    prior: list[float] | None = number(None, 0, 1)
    """Label frequencies to expect in serving, if they differ from validation's (sampled negatives); null: the same."""
    bootstrap: int = number(1000, 0, MAX_SAMPLES)
    """Number of bootstrap resamples of users for confidence intervals; 0 for none."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Maximum tokens per evaluation batch."""
    metrics: list[str] | None = None
    """Metric names, such as auc or ndcg@10; null for the default ones."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.", brief=True)
        check_metrics(self.metrics, "evaluation.metrics")
        if self.prior is not None:
            shares = all(1e-12 <= share < 1 for share in self.prior) and abs(sum(self.prior) - 1) < 1e-3
            require(shares, "evaluation.prior", "one share above 0 a label, 1 in all, each at least 1e-12", self.prior)
            require(self.calibrate, "evaluation.calibrate", "true with evaluation.prior", self.calibrate)


@dataclass(kw_only=True)
class RankingConfig:
    """Ranking of candidates for the positives of the split."""

    candidates: int | Literal["all"] | None = number(None, 2, MAX_COUNT)
    """Items per candidate set, including the positive; all for the whole item table; null for no ranking."""
    sampling: Literal["uniform", "popularity"] = "uniform"
    """Sampling of the negatives of a candidate set: uniform, or by popularity in training."""
    targets: int | None = number(200, 1, MAX_COUNT)
    """Maximum number of positives, drawn at random; null for all."""
    pool: int | None = number(None, 1, MAX_COUNT)
    """With candidates all: number of retrieved items that the model ranks; the rest keep the order of retrieval."""
    retrieval: str | None = None
    """Directory of the retrieval index; null for the one in the bundle, if any."""
    bootstrap: int = number(1000, 0, MAX_SAMPLES)
    """Number of bootstrap resamples of users for confidence intervals; 0 for none."""
    seed: int = number(0, 0, MAX_SEED)
    """Random seed of positives, candidate sets and intervals."""

    def __post_init__(self) -> None:
        check_fields(self, "ranking.", brief=True)
        require(self.pool is None or self.candidates == "all", "ranking.candidates", "all with ranking.pool",
                 self.candidates)  # fmt: skip
