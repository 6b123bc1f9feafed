"""Configurations of the recipes that use trained bundles: evaluate, index, merge, recommend and score."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from llmrec_peft.config.data_options import DataConfig, OptionalDataConfig
from llmrec_peft.config.evaluation_options import MAX_SAMPLES, RankingConfig, check_metrics
from llmrec_peft.fields import MAX_COUNT, MAX_SEED, MAX_TOKENS, check_fields, number, require

MAX_MOMENT = 1e20
"""Largest number for a moment; larger than nanoseconds and file times, so that `check_moment` can name their unit."""


@dataclass(kw_only=True)
class BaseConfig:
    """Base model that a bundle is loaded on."""

    base: str | None = None
    """Base model; null for the one that the bundle names."""
    trust_remote_code: bool = False
    """Run model code that comes with the base."""


@dataclass(kw_only=True)
class LoadConfig(BaseConfig):
    """A bundle, or a model merged from it, and a log."""

    bundle: str
    """Directory of the adapter bundle, or of a merged model."""
    data: DataConfig
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base; null for the one used in training."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Maximum tokens per batch."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)


@dataclass(kw_only=True)
class EvaluateConfig(LoadConfig):
    """Evaluate a trained bundle, or a model merged from it."""

    attn: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; null for the one used in training."""
    mode: Literal["stream", "independent"] = "stream"
    """Score whole streams, or one independent prompt per target; both give the same predictions."""
    split: Literal["train", "valid", "test"] = "test"
    """Split to evaluate."""
    limit: int | None = number(None, 1, MAX_COUNT)
    """Maximum number of targets, in whole streams; null for all."""
    metrics: list[str] | None = None
    """Metric names, such as auc or ndcg@10; null for those that training saved in the bundle."""
    ranking: RankingConfig = field(default_factory=RankingConfig)
    output_dir: str | None = None
    """Output directory for metrics and predictions; null to print only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metrics(self.metrics, "metrics")


@dataclass(kw_only=True)
class IndexConfig(LoadConfig):
    """Fit a retrieval index and collaborative models on a log, and stack them with the predictions of a bundle."""

    retrieval: str | None = None
    """Directory for the retrieval index; null for `retrieval` in the bundle. An existing index there is replaced."""
    refit: bool = False
    """Refit the index on all rows for serving, after the evaluation of the index fitted on training rows."""
    valid_targets: int | None = number(2000, 1, MAX_COUNT)
    """Maximum number of validation targets for fitting the stacking, in whole streams; null for all."""
    test_targets: int | None = number(2000, 1, MAX_COUNT)
    """Maximum number of test targets for evaluation, in whole streams; null for all."""
    bootstrap: int = number(1000, 0, MAX_SAMPLES)
    """Number of bootstrap resamples of users for confidence intervals; 0 for none."""
    seed: int = number(0, 0, MAX_SEED)
    """Random seed of the factors, folds and intervals."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; null for the one used in training."""
    output_dir: str | None = None
    """Output directory for metrics and predictions; null to print only."""


@dataclass(kw_only=True)
class RecommendConfig(LoadConfig):
    """Rank items for many users with a trained bundle, or a model merged from it."""

    output_dir: str
    """Output directory for recommendations.parquet; unfinished jobs there are resumed."""
    users: str | None = None
    """File of users (parquet, csv, jsonl): user_id and columns that header or event names; null: all of the log."""
    until: float | None = number(None, -MAX_MOMENT, MAX_MOMENT)
    """Time of the recommendation, in seconds since 1970; only earlier rows are history. Null for all rows."""
    retrieval: str | None = None
    """Directory of the retrieval index; null for the one in the bundle, if any."""
    quotas: dict[str, float] = number(dict, 0, 1e6)
    """Share of the candidates from each retrieval source; {} for the defaults."""
    candidates: str | None = None
    """File with a column item_id of the items to rank instead of retrieved ones; null for retrieval, or all items."""
    context: dict[str, int | float | str] = number(dict, -(2**63), 2**63 - 1)
    """Values for columns that the event template names and the items lack, the same for all users."""
    k: int = number(10, 1, MAX_COUNT)
    """Maximum number of recommended items per user."""
    pool: int = number(100, 1, MAX_COUNT)
    """Number of retrieved candidates per user."""
    chunk: int = number(64, 1, 1_000_000)
    """Users per shard; a shard is the most work that is lost if a process is killed."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action for a user without a valid request: stop, or skip the user and list it in errors.jsonl."""

    def __post_init__(self) -> None:
        finite = not isinstance(self.until, float) or abs(self.until) < float("inf")
        require(finite, "until", "a finite number of seconds, or null", self.until)
        super().__post_init__()


@dataclass(kw_only=True)
class MergeConfig(BaseConfig):
    """Merge a bundle, or several LoRA bundles with weights, into a stock checkpoint."""

    bundle: list[str] | str
    """Directory of the bundle; a list for a weighted merge, which keeps the domain of the first bundle."""
    output_dir: str
    """Output directory of the merged model; an existing merged model there is replaced."""
    weights: list[float] | None = number(None, -1e6, 1e6)
    """Weight of each bundle of a list."""
    combination: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear"
    """Method to combine a list of bundles."""
    density: float | None = number(None, 0, 1, above=True)
    """Fraction of values that ties, dare_linear, dare_ties and magnitude_prune keep."""
    data: OptionalDataConfig = field(default_factory=OptionalDataConfig)
    split: Literal["valid", "test"] = "test"
    """Split of the log to compare the two models on."""
    limit: int | None = number(500, 1, MAX_COUNT)
    """Maximum number of targets, in whole streams; null for all."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the weights; null for that of the bundle's base. The head stays float32."""
    tolerance: float | None = number(None, 0, 1e6)
    """Maximum allowed difference of a logit; null for the default of the number formats."""
    max_shard_size: str = "2GB"
    """Maximum size of one weights file."""
    batch_tokens: int = number(1000, 1, MAX_TOKENS)
    """Maximum tokens per batch in the comparison."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        require(bool(self.bundle), "bundle", "a directory, or a list of them", self.bundle)
        if isinstance(self.bundle, list):
            requirement = f"{len(self.bundle)} numbers, one for each bundle"
            require(len(self.weights or ()) == len(self.bundle), "weights", requirement, self.weights)
        else:
            require(self.weights is None, "weights", "null for one bundle", self.weights)
            require(self.density is None, "density", "null for one bundle", self.density)
        size = re.fullmatch(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", self.max_shard_size)
        require(size is not None, "max_shard_size", "a size such as 500MB or 2GB", self.max_shard_size)


@dataclass(kw_only=True)
class ScoreConfig(BaseConfig):
    """Score requests of many domains on one base, and measure the swap of a bundle."""

    bundles: dict[str, str]
    """Mapping from domain name to bundle directory."""
    requests: str
    """JSON Lines file of requests: domain, history ([event, label] pairs), candidates (events), optional user."""
    items: dict[str, str] = field(default_factory=dict)
    """Mapping from domain name to item table, or to the directory of the domain's log."""
    fallback: str | None = None
    """Domain to use for requests of unknown domains; null to refuse them."""
    swap: dict[str, str] = field(default_factory=dict)
    """Mapping from domain name to the bundle to swap in and time; by default each bundle is swapped for itself."""
    max_gb: float | None = number(None, 0, 1e6, above=True)
    """Memory limit for loaded adapters, in GB; null for no limit."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base; null for that of the first bundle."""
    batch_requests: int = number(16, 1, 1_000_000)
    """Requests per batch."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Maximum tokens per forward pass."""
    output: str | None = None
    """JSON Lines file for the predictions; null to print the throughput only."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        require(bool(self.bundles), "bundles", "at least one domain and its bundle", self.bundles)
        for name in ("items", "swap"):
            unknown = sorted(set(getattr(self, name)) - set(self.bundles))
            require(not unknown, name, f"a mapping of domains among {', '.join(self.bundles)}", unknown)
        require(self.fallback is None or self.fallback in self.bundles, "fallback",
                 f"null or one of {', '.join(self.bundles)}", self.fallback)  # fmt: skip
