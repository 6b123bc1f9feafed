"""The plan of a student, made from configurations alone: no log is read, and no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.domain import Domain
from llmrec_peft.distillation.distill_options import LossOptions, StudentOptions
from llmrec_peft.distillation.hidden_states import layer_pairs
from llmrec_peft.distillation.item_id_student import write_item_id_student
from llmrec_peft.distillation.pruning import check_prunable
from llmrec_peft.distillation.shallow_student import NO_SHALLOW, choose_layers, write_shallow_student
from llmrec_peft.distillation.teacher import Teacher
from llmrec_peft.errors import ConfigError, ModelError
from llmrec_peft.models.base import load_config, resolve_base
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.requirements import check_positions
from llmrec_peft.models.stock_parts import is_encoder


@dataclass(frozen=True)
class StudentPlan:
    """Kind, layers and loss of a student, checked against its teacher.

    Attributes:
        options, loss: its settings.
        teacher: the teacher.
        teacher_domain: the teacher's domain, by which the teacher reads the log.
        kept_layers: numbers of the teacher's layers that a shallow student consists of; None for other kinds.
        compared_layers: pairs (student's layer, teacher's layer) of the hidden term; empty without one.
    """

    options: StudentOptions
    loss: LossOptions
    teacher: Teacher
    teacher_domain: Domain
    kept_layers: list[int] | None
    compared_layers: list[tuple[int, int]]

    @property
    def domain(self) -> Domain:
        """The student's domain: its teacher's, in item ids for a student that reads them."""
        if self.options.kind != "ids":
            return self.teacher_domain
        return self.teacher_domain.of_ids(self.options.context, self.options.targets)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student's side of `compared_layers`."""
        return tuple(own for own, _ in self.compared_layers)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's side of `compared_layers`."""
        return tuple(other for _, other in self.compared_layers)

    @property
    def reads_content(self) -> bool:
        """Whether a student of item ids reads the teacher's item embeddings."""
        return self.options.kind == "ids" and self.options.content

    @property
    def loads_teacher(self) -> bool:
        """Whether the teacher's weights are needed: for predictions, for layers or for item embeddings."""
        return self.loss.needs_teacher or self.kept_layers is not None or self.reads_content

    @property
    def attention(self) -> str:
        """Attention kernel of the student."""
        return self.teacher.attention if self.kept_layers is not None else "sdpa"

    def prepare_source(self, item_ids: pa.ChunkedArray, seed: int, directory: Path) -> str:
        """Directory or Hub id of the student's tokenizer, and of all weights that are not the teacher's.

        An untrained student of item ids is written to `directory` first.
        """
        if self.options.kind == "small":
            return resolve_base(_base_of(self.options))
        if self.options.kind == "shallow":
            return self.teacher.source
        write_item_id_student(item_ids, self.domain, self.options, seed, directory)
        return str(directory)

    def write_layers(self, teacher: BehaviorClassifier, directory: Path) -> str:
        """Write a shallow student to `directory` and return it; `teacher` cannot be used afterwards."""
        assert self.kept_layers is not None
        write_shallow_student(teacher, self.kept_layers, directory, self.options.mlp, self.options.attention)
        return str(directory)


def plan_student(teacher: Teacher, domain: Domain, options: StudentOptions, loss: LossOptions) -> StudentPlan:
    """Check a student against its teacher, the teacher's domain (`domain`) and the loss, and choose its layers.

    Raises:
        ConfigError: options that exclude each other.
        ModelError: a student that cannot be made of this teacher, or a base that cannot hold the teacher's windows.
    """
    if options.kind == "shallow":
        _check_shallow(teacher, options)
    if options.kind == "small":
        _check_small(teacher, domain, options, loss)
    kept = _kept_layers(teacher, options)
    return StudentPlan(options, loss, teacher, domain, kept, _compared_layers(teacher, options, loss, kept))


def _check_shallow(teacher: Teacher, options: StudentOptions) -> None:
    if teacher.manifest.get("method") == "adapter":
        raise ModelError(NO_SHALLOW)
    if options.mlp < 1 or options.attention < 1:
        check_prunable(teacher.model_config(), teacher.trust_remote_code)


def _check_small(teacher: Teacher, domain: Domain, options: StudentOptions, loss: LossOptions) -> None:
    if domain.reads_ids and not domain.marker:
        raise ConfigError(
            f"student.kind small reads item texts, and teacher {teacher.directory} reads item ids; choose ids or "
            "shallow"
        )
    own = load_config(_base_of(options), trust_remote_code=teacher.trust_remote_code)
    try:
        check_positions(own, domain.stream.max_length)
    except ModelError as error:
        reason = str(error).split(";")[0]
        raise ModelError(
            f"student.base {options.base} cannot hold the teacher's windows: {reason}; choose another base, or a "
            "teacher of shorter windows"
        ) from None
    if loss.pairs and is_encoder(own):
        raise ConfigError(
            f"loss.pairs compares targets of one stream, and student.base {options.base} ({own.model_type}) reads each "
            "target alone; set it to 0"
        )


def _kept_layers(teacher: Teacher, options: StudentOptions) -> list[int] | None:
    """The teacher's layers of a shallow student, a third of them by default; None for other kinds."""
    if options.kind != "shallow":
        return None
    depth = teacher.depth()
    pruned = options.mlp < 1 or options.attention < 1
    return choose_layers(depth, options.layers or max(1, depth // 3), options.pick, pruned)


def _compared_layers(
    teacher: Teacher, options: StudentOptions, loss: LossOptions, kept: list[int] | None
) -> list[tuple[int, int]]:
    if not loss.hidden:
        return []
    if kept is not None:
        return layer_pairs(len(kept), teacher.depth(), kept)
    own = load_config(_base_of(options), trust_remote_code=teacher.trust_remote_code)
    return layer_pairs(own.get_text_config().num_hidden_layers, teacher.depth())


def _base_of(options: StudentOptions) -> str:
    """Base of a small student, which `StudentOptions` requires."""
    assert options.base is not None
    return options.base
