"""The behaviour trainer with a teacher's predictions beside the labels.

Shape letters: T targets of a micro-batch, C labels, K layers, S the student's hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from llmrec_peft.distillation.distill_losses import (
    HiddenStateLoss,
    pairwise_margin_loss,
    soft_target_loss,
    target_weights,
)
from llmrec_peft.distillation.distill_options import LossOptions
from llmrec_peft.distillation.hidden_states import LayerOutputs
from llmrec_peft.distillation.teacher_outputs import TeacherPredictions
from llmrec_peft.errors import ConfigError
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.training.distributed import uses_fsdp
from llmrec_peft.training.trainer import BehaviorTrainer


def check_not_sharded(arguments: TrainingArguments) -> None:
    """Raise ConfigError where the launch splits weights over processes, which students do not support."""
    plugin = arguments.deepspeed_plugin
    if uses_fsdp() or (plugin is not None and plugin.zero_stage == 3):
        raise ConfigError(
            "students do not support ZeRO-3 or FSDP, which split weights over processes; launch distilling with ddp or "
            "single_cpu"
        )


class DistillTrainer(BehaviorTrainer):
    """Trains a student on labels and on a teacher's predictions for the same targets.

    A target without a prediction is learnt from its label alone, and one without a label from its prediction alone.

    Args:
        teacher: predictions for the training streams' targets, by target number; None where the loss reads none.
        distill_loss: the terms and their weights. The hard term is the trainer's own `loss`.
        layers: with a hidden term, the student's layers that are compared with `teacher.layers`; -1 is the input of
            the head.
        args, options: as in `BehaviorTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: TeacherPredictions | None,
        distill_loss: LossOptions,
        layers: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if distill_loss.needs_teacher and teacher is None:
            raise ConfigError("loss: soft, pairs or hidden is above 0, but there are no teacher predictions; give them")
        self.distill_loss, self.layers = distill_loss, tuple(layers) if distill_loss.hidden else ()
        self.teacher = teacher
        self.hidden_loss: HiddenStateLoss | None = None
        if self.layers:
            self.hidden_loss = self._hidden_state_loss()

    def _hidden_state_loss(self) -> HiddenStateLoss:
        hidden = None if self.teacher is None else self.teacher.hidden
        if self.teacher is None or hidden is None or hidden.shape[1] != len(self.layers):
            layers = () if self.teacher is None else self.teacher.layers
            raise ConfigError(
                f"loss.hidden: the teacher's predictions have hidden states of layers {layers}, the student has "
                f"{self.layers}; cache one of the teacher's layers for each"
            )
        width = self._student.config.get_text_config().hidden_size
        return HiddenStateLoss(len(self.layers), width, hidden.shape[2]).to(self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimiser of the student and of the projections of the hidden term, which are not part of the student."""
        optimizer = super().create_optimizer(*args, **kwargs)
        extra = [] if self.hidden_loss is None else list(self.hidden_loss.parameters())
        if extra:
            optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        return optimizer

    def _loss_share(self, model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None) -> torch.Tensor:
        """This micro-batch's part of the global mean, times the ranks, since gradients are averaged over them."""
        inputs = {key: value.to(self.args.device) for key, value in batch.items() if torch.is_tensor(value)}
        labels, groups, targets = inputs.pop("labels"), inputs.pop("groups"), inputs.pop("targets")
        with LayerOutputs(self._student, self.layers) as outputs:
            logits = model(**inputs)
            hidden = outputs.at(inputs["markers"]) if self.layers else None
        if batch.get("spare"):
            return logits.sum() * 0.0
        self.targets_seen += len(labels)
        total = logits.sum() * 0.0  # keeps the graph where no term applies
        known = labels >= 0  # bool [T]; -1 marks targets without a label
        if self.distill_loss.hard and known.any():
            total = total + self.distill_loss.hard * self.loss(logits[known], labels[known], groups[known])
        if self.teacher is not None:
            # A marker's flat index is b * L + l: its row b is its stream.
            rows = inputs["markers"] // inputs["input_ids"].shape[1]
            for term in self._teacher_terms(self.teacher, logits, labels, targets.cpu(), rows, hidden):
                total = total + term
        # W / N, as in `BehaviorTrainer._loss_share`.
        return total * (self.accelerator.num_processes / num_items)

    def _teacher_terms(
        self,
        teacher: TeacherPredictions,
        logits_TC: torch.Tensor,
        labels_T: torch.Tensor,
        targets_T: torch.Tensor,
        rows_T: torch.Tensor,
        hidden_TKS: torch.Tensor | None,
    ) -> Iterator[torch.Tensor]:
        """Weighted terms that read the teacher, over the targets that have a prediction.

        Three index spaces meet: `targets_T` are numbers in the data set, which index `teacher.logits` and
        `teacher.rows`; `teacher.rows` index `teacher.hidden`; `has` selects the micro-batch's targets among 0..T.
        """
        options, device = self.distill_loss, logits_TC.device
        teacher_TC = torch.from_numpy(teacher.logits)[targets_T].to(device)
        has = torch.isfinite(teacher_TC).all(1)  # bool [T]; NaN marks targets without a prediction
        if not has.any():
            return
        logits_TC, teacher_TC = logits_TC[has], teacher_TC[has]
        if options.soft:
            weights_T = target_weights(teacher_TC, labels_T[has], options.weighting)
            yield options.soft * soft_target_loss(logits_TC, teacher_TC, options.temperature, weights_T)
        if options.pairs:
            yield options.pairs * pairwise_margin_loss(
                logits_TC, teacher_TC, rows_T[has], options.pair_gap, options.pair_margin
            )
        if hidden_TKS is not None and self.hidden_loss is not None:
            assert teacher.rows is not None and teacher.hidden is not None
            rows = teacher.rows[targets_T[has.cpu()].numpy()]
            cached_TKH = torch.from_numpy(teacher.hidden[rows]).to(device)
            yield options.hidden * self.hidden_loss(hidden_TKS[has], cached_TKH)

    @property
    def _student(self) -> BehaviorClassifier:
        """The classifier itself, without the wrapper for several processes."""
        assert isinstance(self.model, BehaviorClassifier)
        return self.model
