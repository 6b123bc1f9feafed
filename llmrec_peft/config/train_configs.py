"""Configurations of the recipes that train: one for each tuning method, and distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from llmrec_peft.config.data_options import DataConfig
from llmrec_peft.config.evaluation_options import EvaluationConfig
from llmrec_peft.config.train_options import TrainConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.distillation.distill_options import LossOptions, StudentOptions, TeacherOutputsOptions
from llmrec_peft.fields import check_fields, require
from llmrec_peft.models.tuning_options import (
    AdapterOptions,
    FullOptions,
    HeadOptions,
    LoraOptions,
    MethodOptions,
    ModelOptions,
    QloraOptions,
)


@dataclass(kw_only=True)
class TrainRecipeConfig:
    """Options of every training recipe; the class of each tuning method adds its own."""

    method_name: ClassVar[str]

    data: DataConfig
    domain: Domain
    """Domain: a YAML file (relative to the file that names it), or its keys in place."""
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "out"
    """Output directory of the run."""

    if TYPE_CHECKING:

        @property
        def method(self) -> MethodOptions:
            """Options of the tuning method, a field of each subclass."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        labels = self.domain.labels
        requirement = f"{len(labels)} numbers, for {', '.join(labels)}"
        weights, prior = self.train.class_weights, self.evaluation.prior
        if isinstance(weights, list):
            require(len(weights) == len(labels), "train.class_weights", requirement, weights)
        if prior is not None:
            require(len(prior) == len(labels), "evaluation.prior", requirement, prior)

    @property
    def start(self) -> str:
        """Name of the model that training starts from."""
        return self.model.base


@dataclass(kw_only=True)
class LoraConfig(TrainRecipeConfig):
    """Train a LoRA adapter."""

    method_name: ClassVar[str] = "lora"
    method: LoraOptions = field(default_factory=LoraOptions)


@dataclass(kw_only=True)
class QloraConfig(TrainRecipeConfig):
    """Train a LoRA adapter on a 4-bit base."""

    method_name: ClassVar[str] = "qlora"
    method: QloraOptions = field(default_factory=QloraOptions)


@dataclass(kw_only=True)
class AdapterConfig(TrainRecipeConfig):
    """Train bottleneck adapters."""

    method_name: ClassVar[str] = "adapter"
    method: AdapterOptions = field(default_factory=AdapterOptions)


@dataclass(kw_only=True)
class HeadConfig(TrainRecipeConfig):
    """Train the classification head only."""

    method_name: ClassVar[str] = "head"
    method: HeadOptions = field(default_factory=HeadOptions)


@dataclass(kw_only=True)
class FullConfig(TrainRecipeConfig):
    """Train all weights."""

    method_name: ClassVar[str] = "full"
    method: FullOptions = field(default_factory=FullOptions)


@dataclass(kw_only=True)
class DistillConfig:
    """Train a small student on the predictions of a teacher and on labels."""

    method_name: ClassVar[str] = "distill"

    teacher: str
    """Directory of the teacher: an adapter bundle, or a merged model."""
    data: DataConfig
    student: StudentOptions = field(default_factory=StudentOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    teacher_outputs: TeacherOutputsOptions = field(default_factory=TeacherOutputsOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    base: str | None = None
    """Base of the teacher; null for the one that its bundle names."""
    trust_remote_code: bool = False
    """Run model code that comes with the base of the teacher or the student."""
    output_dir: str = "out"
    """Output directory of the run; the student is in its subdirectory `student`."""

    def __post_init__(self) -> None:
        check_fields(self, brief=True)
        ids = self.student.kind == "ids"
        require(not (ids and self.loss.hidden), "loss.hidden", "0 for a student of item ids, which reads other tokens",
                 self.loss.hidden)  # fmt: skip
        require(not self.teacher_outputs.unlabelled or self.loss.needs_teacher, "teacher_outputs.unlabelled",
                 "false where the loss has no term of the teacher", True)  # fmt: skip

    @property
    def start(self) -> str:
        """Name of the model that the student starts from."""
        return self.student.base or self.teacher


RunConfig = TrainRecipeConfig | DistillConfig
"""Configuration of a run that trains."""
