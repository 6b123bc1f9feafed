"""The behaviour trainer with a teacher's answers beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmrec_peft.distillation.distill_losses import HiddenMatch, soft_targets, sure_pairs, target_weights
from llmrec_peft.distillation.distill_options import LossOptions
from llmrec_peft.distillation.teacher_outputs import LayerOutputs, TeacherAnswers
from llmrec_peft.errors import ConfigError
from llmrec_peft.training.trainer import BehaviorTrainer


class DistillTrainer(BehaviorTrainer):
    """Trains a student on labels and on a teacher's answers to the same targets.

    What the teacher did not answer is learnt from its label alone.

    Args:
        teacher: its answers to the training streams' targets, by target number; None where the loss reads none.
        distill_loss: the terms and their weights. The hard term is the trainer's own `loss`.
        layers: with hidden states, the student's layers that stand beside `teacher.layers`; -1 is what the head reads.
        others: as `BehaviorTrainer`'s.
    """

    def __init__(
        self,
        *args: Any,
        teacher: TeacherAnswers | None,
        distill_loss: LossOptions,
        layers: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if distill_loss.needs_teacher and teacher is None:
            raise ConfigError("loss: soft, pairs or hidden is above 0, but there are no teacher's answers; give them")
        self.distill_loss, self.layers = distill_loss, tuple(layers) if distill_loss.hidden else ()
        self._teacher = None if teacher is None else torch.from_numpy(teacher.logits)
        self._answers = teacher
        self._match: HiddenMatch | None = None
        if self.layers:
            if teacher.hidden is None or teacher.hidden.shape[1] != len(self.layers):
                raise ConfigError(f"loss.hidden: the teacher's answers keep layers {teacher.layers}, the student has "
                                  f"{self.layers}; keep one of the teacher's for each")  # fmt: skip
            width = self.model.config.get_text_config().hidden_size
            self._match = HiddenMatch(len(self.layers), width, teacher.hidden.shape[2]).to(self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimiser, of the projections between hidden widths too, which are not part of the student."""
        optimizer = super().create_optimizer(*args, **kwargs)
        extra = [] if self._match is None else list(self._match.parameters())
        if extra:
            optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        return optimizer

    def _loss_share(self, model: Any, batch: dict, num_items: torch.Tensor) -> torch.Tensor:
        """This micro-batch's part of the global mean, times the ranks."""
        inputs = {key: value.to(self.args.device) for key, value in batch.items() if torch.is_tensor(value)}
        labels, groups, targets = inputs.pop("labels"), inputs.pop("groups"), inputs.pop("targets")
        with LayerOutputs(self.model, self.layers) as outputs:
            logits = model(**inputs)
            student = outputs.at(inputs["markers"]) if self.layers else None
        if batch.get("spare"):
            return logits.sum() * 0.0
        self.targets_seen += len(labels)
        rows = inputs["markers"] // inputs["input_ids"].shape[1]
        total = self._sum(logits, labels, groups, targets.cpu(), rows, student)
        return total * (self.accelerator.num_processes / num_items)

    def _sum(self, logits, labels, groups, targets, rows, student) -> torch.Tensor:
        """Sum of all terms over the answers of a micro-batch."""
        weights, known = self.distill_loss, labels >= 0
        total = logits.sum() * 0.0
        if weights.hard and known.any():
            total = total + weights.hard * self.loss(logits[known], labels[known], groups[known])
        if self._teacher is None:
            return total
        answers = self._teacher[targets].to(logits.device)
        asked = torch.isfinite(answers).all(1)
        if not asked.any():
            return total
        own, answers = logits[asked], answers[asked]
        if weights.soft:
            each = target_weights(answers, labels[asked], weights.weighting)
            total = total + weights.soft * soft_targets(own, answers, weights.temperature, each)
        if weights.pairs:
            total = total + weights.pairs * sure_pairs(own, answers, rows[asked], weights.pair_gap, weights.pair_margin)
        if student is not None:
            place = torch.from_numpy(self._answers.rows)[targets][asked.cpu()]
            kept = torch.from_numpy(self._answers.hidden[place.numpy()]).to(logits.device)
            total = total + weights.hidden * self._match(student[asked], kept)
        return total


def layer_map(student: int, teacher: int, kept: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Pairs (student's layer, teacher's layer) whose outputs are compared; the last is (-1, -1), the heads' inputs.

    student, teacher: numbers of layers. kept: the layers that a shallow student was made of; else
    layer i of n stands beside the teacher's at the same share of its depth.
    """
    pairs = []
    for own in range(max(0, student // 2 - 1), student - 1, max(1, student // 4)):
        other = kept[own] if kept is not None else round((own + 1) * teacher / student) - 1
        pairs.append((own, other))
    return [*pairs, (-1, -1)]
