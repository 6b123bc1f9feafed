"""The recipes' configurations: what each recipe can be told, its types, defaults and limits.

The string under a field is its help text and is written nowhere else. `parse_config` reads these classes from YAML
files and flags (see arguments.py).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

from llmrec_peft.boundary import exit_on_error
from llmrec_peft.config.parsing import config_to_yaml, parse_config, read_config
from llmrec_peft.data.domain import Domain
from llmrec_peft.distillation.distill_options import AnswersOptions, LossOptions, StudentOptions
from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.metrics import find_metric, higher_is_better
from llmrec_peft.fields import MAX_COUNT, MAX_SEED, MAX_TOKENS, check_fields, number, require
from llmrec_peft.models.tuning_options import (
    AdapterOptions,
    FullOptions,
    HeadOptions,
    LoraOptions,
    ModelOptions,
    QloraOptions,
)

__all__ = [
    "CONFIGS",
    "AdapterConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "FullConfig",
    "IndexConfig",
    "HeadConfig",
    "LoraConfig",
    "MergeConfig",
    "QloraConfig",
    "RankingConfig",
    "RecommendConfig",
    "ScoreConfig",
    "TrainConfig",
    "TrainRecipeConfig",
    "config_to_yaml",
    "exit_on_error",
    "parse_config",
    "read_config",
]


MAX_SAMPLES = 100_000
"""Resamples of a bootstrap, at most."""
MAX_MOMENT = 1e20
"""Number that names a moment, at most; beyond nanoseconds and file times, whose unit `check_moment` names."""


def _check_metrics(names: list[str] | None, key: str) -> None:
    """Names that exist, one at least of which is no count: a report on counts alone would say nothing."""
    values = [name for name in names or [] if not find_metric(name)[0].count]
    require(names is None or bool(values), key, "null or a list with a metric other than counts, such as auc", names)


@dataclass(kw_only=True)
class DataConfig:
    """Where the behaviour log lies."""

    path: str
    """Directory or file of the log, a Hub data set, or simulated:shop for a simulated one."""
    format: str = "auto"
    """Name of the reader; auto finds it from the files."""
    null_times: Literal["refuse", "drop"] = "refuse"
    """Whether interactions without a timestamp stop the reading or are left out, with a count."""

    def __post_init__(self) -> None:
        check_fields(self, "data.", brief=True)
        require(bool(self.path.strip()), "data.path", "the place of a log", self.path)


@dataclass(kw_only=True)
class TrainConfig:
    """How the adapter is trained."""

    max_steps: int = number(-1, 1, MAX_COUNT, also=(-1,))
    """Optimiser steps; -1 to go by epochs."""
    epochs: float = number(1.0, 0, 1e6, above=True)
    """Passes over the training targets, if max_steps is -1."""
    batch_size: int = number(8, 1, 1_000_000)
    """Streams in one global batch: over all ranks and all accumulation steps."""
    micro_tokens: int = number(1200, 1, MAX_TOKENS)
    """Tokens that go through the model at once, at most; memory and speed depend on it, the gradient does not."""
    learning_rate: float = number(3e-4, 0, 100, above=True)
    """Highest learning rate."""
    weight_decay: float = number(0.0, 0, 1000)
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    """Optimiser."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: float = number(0.05, 0, 1, below=True)
    """Share of the steps in which the learning rate rises from 0."""
    max_grad_norm: float = number(1.0, 0, 1e9)
    """Gradients are scaled down to this norm; 0 for never."""
    loss: Literal["cross_entropy", "focal", "listwise"] = "cross_entropy"
    """Loss: per target, per target with weight on the hard ones, or softmax over the events of one list."""
    class_weights: Literal["balanced"] | list[float] | None = number(None, 0, 1e6)
    """Weight of each class in the loss: balanced, one number a class, or null."""
    focal_gamma: float = number(2.0, 0, 100)
    """Exponent of the focal loss."""
    label_smoothing: float = number(0.0, 0, 1, below=True)
    """Share of the truth that is spread over all classes."""
    eval_steps: int = number(0, 0, MAX_COUNT)
    """Steps between two validations; 0 for one at the end."""
    save_steps: int = number(0, 0, MAX_COUNT)
    """Steps between two checkpoints; 0 for none beside those that selection needs."""
    select_metric: str = "logloss"
    """Validation metric that chooses the best checkpoint and stops early."""
    early_stopping: int = number(0, 0, MAX_COUNT)
    """Validations without improvement before training stops; 0 for never."""
    seed: int = number(0, 0, MAX_SEED)
    """Seed of order, dropout and new weights."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers, by the names that Trainer knows; [] for none."""
    logging_steps: int = number(5, 1, MAX_COUNT)
    """Steps between two log lines."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir."""

    def __post_init__(self) -> None:
        check_fields(self, "train.", brief=True)
        if isinstance(self.class_weights, list):
            require(any(self.class_weights), "train.class_weights", "finite and not negative, one of them above 0",
                    self.class_weights)  # fmt: skip
        higher_is_better(self.select_metric)
        require(not (self.early_stopping and not self.eval_steps), "train.eval_steps",
                 "at least 1 with early_stopping", self.eval_steps)  # fmt: skip
        if self.eval_steps and self.save_steps not in (0, self.eval_steps):
            raise ConfigError(
                f"train.save_steps {self.save_steps} must be 0 or equal train.eval_steps {self.eval_steps}: the best "
                f"checkpoint must have been saved when it was measured; leave train.save_steps out"
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is measured after (and before) training."""

    valid_targets: int | None = number(2000, 1, MAX_COUNT)
    """Validation targets, at most, in whole streams; null for all."""
    test_targets: int | None = number(2000, 1, MAX_COUNT)
    """Test targets, at most, in whole streams; null for all."""
    before: bool = True
    """Measure the untrained classifier too."""
    calibrate: bool = True
    """Fit a temperature and one bias a label on validation, and keep them in the bundle."""
    prior: list[float] | None = number(None, 0, 1)
    """Shares of the labels in the traffic to come, where validation has others (sampled negatives); null: the same."""
    bootstrap: int = number(1000, 0, MAX_SAMPLES)
    """Resamples of the users for confidence intervals; 0 for none."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Tokens that are scored at once, at most."""
    metrics: list[str] | None = None
    """Metrics by name, such as auc or ndcg@10; null for the usual ones."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.", brief=True)
        _check_metrics(self.metrics, "evaluation.metrics")
        if self.prior is not None:
            shares = all(1e-12 <= share < 1 for share in self.prior) and abs(sum(self.prior) - 1) < 1e-3
            require(shares, "evaluation.prior", "one share above 0 a label, 1 in all, each at least 1e-12", self.prior)
            require(self.calibrate, "evaluation.calibrate", "true with evaluation.prior", self.calibrate)


@dataclass(kw_only=True)
class TrainRecipeConfig:
    """What every training recipe takes; each method's class adds its options."""

    method_name: ClassVar[str]

    data: DataConfig
    domain: Domain
    """The domain: a YAML file (relative to the file that names it), or its keys in place."""
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "out"
    """Directory of everything that the run leaves."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        weights, labels = self.train.class_weights, self.domain.labels
        if isinstance(weights, list):
            requirement = f"{len(labels)} numbers, for {', '.join(labels)}"
            require(len(weights) == len(labels), "train.class_weights", requirement, weights)
        prior = self.evaluation.prior
        if prior is not None:
            requirement = f"{len(labels)} numbers, for {', '.join(labels)}"
            require(len(prior) == len(labels), "evaluation.prior", requirement, prior)


@dataclass(kw_only=True)
class LoraConfig(TrainRecipeConfig):
    """Train a LoRA adapter."""

    method_name: ClassVar[str] = "lora"
    method: LoraOptions = field(default_factory=LoraOptions)


@dataclass(kw_only=True)
class QloraConfig(TrainRecipeConfig):
    """Train a LoRA adapter on a base held in 4 bits."""

    method_name: ClassVar[str] = "qlora"
    method: QloraOptions = field(default_factory=QloraOptions)


@dataclass(kw_only=True)
class AdapterConfig(TrainRecipeConfig):
    """Train bottleneck adapters."""

    method_name: ClassVar[str] = "adapter"
    method: AdapterOptions = field(default_factory=AdapterOptions)


@dataclass(kw_only=True)
class HeadConfig(TrainRecipeConfig):
    """Train the classification head alone."""

    method_name: ClassVar[str] = "head"
    method: HeadOptions = field(default_factory=HeadOptions)


@dataclass(kw_only=True)
class FullConfig(TrainRecipeConfig):
    """Train every weight."""

    method_name: ClassVar[str] = "full"
    method: FullOptions = field(default_factory=FullOptions)


@dataclass(kw_only=True)
class DistillConfig:
    """Train a small student on a teacher's answers and on labels."""

    method_name: ClassVar[str] = "distill"

    teacher: str
    """Directory of the teacher: an adapter bundle, or a merged model."""
    data: DataConfig
    student: StudentOptions = field(default_factory=StudentOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    answers: AnswersOptions = field(default_factory=AnswersOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    base: str | None = None
    """Base of the teacher; null for the one that its bundle names."""
    trust_remote_code: bool = False
    """Allow code that comes with the teacher's or the student's base to run."""
    output_dir: str = "out"
    """Directory of everything that the run leaves; the student is in `student` there."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        ids = self.student.kind == "ids"
        require(not (ids and self.loss.hidden), "loss.hidden", "0 for a student of item ids, which reads other tokens",
                 self.loss.hidden)  # fmt: skip
        require(not self.answers.unlabelled or self.loss.needs_teacher, "answers.unlabelled",
                 "false where the loss reads no teacher's answers", True)  # fmt: skip

    @cached_property
    def teacher_domain(self) -> Domain:
        """The domain that the teacher answers, read from its directory; rows without a label may be asked about."""
        from llmrec_peft.checkpoints.manifest import read_manifest

        domain = Domain.of_manifest(read_manifest(self.teacher)["domain"], source=f"teacher {self.teacher}")
        if self.answers.unlabelled:
            domain = dataclasses.replace(domain, label=dataclasses.replace(domain.label, missing="leave_out"))
        return domain

    @property
    def domain(self) -> Domain:
        """The student's domain: its teacher's, in item ids for a student that reads them."""
        found = self.teacher_domain
        return found.of_ids(self.student.context, self.student.targets) if self.student.kind == "ids" else found

    @property
    def model(self) -> ModelOptions:
        """What the student starts from, as other training recipes say it."""
        return ModelOptions(base=self.student.base or self.teacher, trust_remote_code=self.trust_remote_code)

    @property
    def method(self) -> FullOptions:
        """A student trains all of its weights."""
        return FullOptions()


@dataclass(kw_only=True)
class RankingConfig:
    """How candidates are ranked for the positives of the split."""

    candidates: int | Literal["all"] | None = number(None, 2, MAX_COUNT)
    """Items of each list, the positive among them; all for the whole item table; null for no ranking."""
    sampling: Literal["uniform", "popularity"] = "uniform"
    """How the others of a list are drawn; by how often training took them, or each alike."""
    targets: int | None = number(200, 1, MAX_COUNT)
    """Positives, at most, drawn at random; null for all."""
    pool: int | None = number(None, 1, MAX_COUNT)
    """With all candidates: those that retrieval names for the model to rank; the rest follow in retrieval's order."""
    retrieval: str | None = None
    """Directory of what a log says of its items; null for the one in the bundle, if there is one."""
    bootstrap: int = number(1000, 0, MAX_SAMPLES)
    """Resamples of the users for confidence intervals; 0 for none."""
    seed: int = number(0, 0, MAX_SEED)
    """Seed of the positives, of their lists and of the intervals."""

    def __post_init__(self) -> None:
        check_fields(self, "ranking.", brief=True)
        require(self.pool is None or self.candidates == "all", "ranking.candidates", "all with ranking.pool",
                 self.candidates)  # fmt: skip


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a trained bundle, or a model merged from it, again."""

    bundle: str
    """Directory of the adapter bundle, or of a merged model."""
    data: DataConfig
    base: str | None = None
    """Base model; null for the one that the bundle names."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base; null for the one that it was trained in."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; null for the one that it was trained with."""
    trust_remote_code: bool = False
    """Allow code that comes with the base to run."""
    mode: Literal["stream", "independent"] = "stream"
    """Score whole streams, or each target as a prompt of its own; the answers agree."""
    split: Literal["train", "valid", "test"] = "test"
    """Which targets to score."""
    limit: int | None = number(None, 1, MAX_COUNT)
    """Targets, at most, in whole streams; null for all."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Tokens that are scored at once, at most."""
    metrics: list[str] | None = None
    """Metrics by name, such as auc or ndcg@10; null for those that training left in the bundle."""
    ranking: RankingConfig = field(default_factory=RankingConfig)
    output_dir: str | None = None
    """Directory for metrics and predictions; null to print only."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        _check_metrics(self.metrics, "metrics")


@dataclass(kw_only=True)
class IndexConfig:
    """Fit what a log says of its items beside a bundle's answers, and keep both for recommending."""

    bundle: str
    """Directory of the adapter bundle, or of a merged model."""
    data: DataConfig
    retrieval: str | None = None
    """Directory for what is fitted; null for `retrieval` in the bundle. What was fitted before is replaced."""
    refit: bool = False
    """Keep models of all rows for serving, once everything is measured with those of the training rows."""
    valid_targets: int | None = number(2000, 1, MAX_COUNT)
    """Validation targets that the fusion is fitted on, at most, in whole streams; null for all."""
    test_targets: int | None = number(2000, 1, MAX_COUNT)
    """Test targets that are measured, at most, in whole streams; null for all."""
    bootstrap: int = number(1000, 0, MAX_SAMPLES)
    """Resamples of the users for confidence intervals; 0 for none."""
    seed: int = number(0, 0, MAX_SEED)
    """Seed of the factors, of the folds and of the intervals."""
    base: str | None = None
    """Base model; null for the one that the bundle names."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base; null for the one that it was trained in."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; null for the one that it was trained with."""
    trust_remote_code: bool = False
    """Allow code that comes with the base to run."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Tokens that are scored at once, at most."""
    output_dir: str | None = None
    """Directory for metrics and predictions; null to print only."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)


@dataclass(kw_only=True)
class MergeDataConfig:
    """A log whose targets both models answer."""

    path: str | None = None
    """Directory or file of the log, a Hub data set, or simulated:shop; null for made-up samples."""
    format: str = "auto"
    """Name of the reader; auto finds it from the files."""
    null_times: Literal["refuse", "drop"] = "refuse"
    """Whether interactions without a timestamp stop the reading or are left out, with a count."""

    def __post_init__(self) -> None:
        check_fields(self, "data.", brief=True)


@dataclass(kw_only=True)
class MergeConfig:
    """Merge a bundle, or several LoRA bundles weighted, into a stock checkpoint."""

    bundle: list[str] | str
    """Directory of the bundle; a list for a weighted merge, whose first bundle's domain goes on."""
    output_dir: str
    """Directory of the merged model; an earlier one there is replaced."""
    weights: list[float] | None = number(None, -1e6, 1e6)
    """Weight of each bundle of a list."""
    combination: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear"
    """How the bundles of a list are combined."""
    density: float | None = number(None, 0, 1, above=True)
    """Share of the numbers that ties, dare_linear, dare_ties and magnitude_prune keep."""
    data: MergeDataConfig = field(default_factory=MergeDataConfig)
    split: Literal["valid", "test"] = "test"
    """Which targets of the log are answered."""
    limit: int | None = number(500, 1, MAX_COUNT)
    """Targets, at most, in whole streams; null for all."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the weights; null for that of the bundle's base. The head stays float32."""
    tolerance: float | None = number(None, 0, 1e6)
    """Largest difference of a logit that passes; null for the usual one of the number formats."""
    max_shard_size: str = "2GB"
    """Size of one weights file, at most."""
    batch_tokens: int = number(1000, 1, MAX_TOKENS)
    """Tokens that are answered at once, at most."""
    base: str | None = None
    """Base model; null for the one that the bundle names."""
    trust_remote_code: bool = False
    """Allow code that comes with the base to run."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        many = isinstance(self.bundle, list)
        require(bool(self.bundle), "bundle", "a directory, or a list of them", self.bundle)
        if many:
            requirement = f"{len(self.bundle)} numbers, one for each bundle"
            require(len(self.weights or ()) == len(self.bundle), "weights", requirement, self.weights)
        else:
            require(self.weights is None, "weights", "null for one bundle", self.weights)
            require(self.density is None, "density", "null for one bundle", self.density)
        size = re.fullmatch(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", self.max_shard_size)
        require(size is not None, "max_shard_size", "a size such as 500MB or 2GB", self.max_shard_size)


@dataclass(kw_only=True)
class RecommendConfig:
    """Rank items for many users by a trained bundle, or by a model merged from it."""

    bundle: str
    """Directory of the adapter bundle, or of a merged model."""
    data: DataConfig
    output_dir: str
    """Directory for recommendations.parquet; parts of an unfinished job there are gone on with."""
    users: str | None = None
    """File with a column user_id and columns that header or event name (parquet, csv, jsonl); null for the log's."""
    until: float | None = number(None, -MAX_MOMENT, MAX_MOMENT)
    """Moment of the recommendation, in seconds since 1970: only earlier rows are history; null for all rows."""
    retrieval: str | None = None
    """Directory of what a log says of its items; null for the one in the bundle, if there is one."""
    quotas: dict[str, float] = number(dict, 0, 1e6)
    """Share of each retrieval source; {} for the usual ones."""
    candidates: str | None = None
    """File with a column item_id of the items to rank, in place of retrieval; null for retrieval, or else all items."""
    context: dict[str, int | float | str] = number(dict, -(2**63), 2**63 - 1)
    """Columns of the moment that the event names and items lack, for all users."""
    k: int = number(10, 1, MAX_COUNT)
    """Items for each user, at most."""
    pool: int = number(100, 1, MAX_COUNT)
    """Candidates that retrieval names for each user."""
    chunk: int = number(64, 1, 1_000_000)
    """Users that are answered together, and lost at most if a process is killed."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a user who cannot be answered: stop, or leave the user out and say so in errors.jsonl."""
    base: str | None = None
    """Base model; null for the one that the bundle names."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base; null for the one that it was trained in."""
    trust_remote_code: bool = False
    """Allow code that comes with the base to run."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Tokens of one forward pass, at most."""

    def __post_init__(self) -> None:
        finite = not isinstance(self.until, float) or abs(self.until) < float("inf")
        require(finite, "until", "a finite number of seconds, or null", self.until)
        check_fields(self, brief=True)


@dataclass(kw_only=True)
class ScoreConfig:
    """Score requests of many domains on one base, and swap a domain's bundle."""

    bundles: dict[str, str]
    """From a domain's name to the directory of its bundle."""
    requests: str
    """File of JSON lines: domain, history ([event, label] pairs), candidates (events), and user where a header asks."""
    base: str | None = None
    """Base model that all bundles were trained on; null for the one that they name."""
    items: dict[str, str] = field(default_factory=dict)
    """From a domain's name to its item table, or to the directory of its log."""
    fallback: str | None = None
    """Domain that answers for names that the bank does not have; null to refuse them."""
    swap: dict[str, str] = field(default_factory=dict)
    """From a domain's name to the bundle that takes its place, and is measured; by default each bundle in its own."""
    max_gb: float | None = number(None, 0, 1e6, above=True)
    """Memory that bundles may take, in GB; null for no limit."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base; null for that of the first bundle."""
    trust_remote_code: bool = False
    """Allow code that comes with the base to run."""
    batch_requests: int = number(16, 1, 1_000_000)
    """Requests that are answered together."""
    batch_tokens: int = number(4000, 1, MAX_TOKENS)
    """Tokens of one forward pass, at most."""
    output: str | None = None
    """File of JSON lines for the answers; null to print the throughput only."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        require(bool(self.bundles), "bundles", "at least one domain and its bundle", self.bundles)
        for name in ("items", "swap"):
            unknown = sorted(set(getattr(self, name)) - set(self.bundles))
            require(not unknown, name, f"a mapping of domains among {', '.join(self.bundles)}", unknown)
        require(self.fallback is None or self.fallback in self.bundles, "fallback",
                 f"null or one of {', '.join(self.bundles)}", self.fallback)  # fmt: skip


CONFIGS: dict[str, type] = {
    **{kind.method_name: kind for kind in (LoraConfig, QloraConfig, AdapterConfig, HeadConfig, FullConfig)},
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "index": IndexConfig,
    "merge": MergeConfig,
    "recommend": RecommendConfig,
    "score": ScoreConfig,
}
"""From a recipe's name (`recipes/NAME.py`, `recipes/configs/*/NAME.yaml`) to its configuration."""
