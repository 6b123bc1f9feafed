"""Callbacks of the trainer: validation after the last step, and early stopping that can be resumed."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EvaluateLastStep(TrainerCallback):
    """Validate after the last step too, so that its checkpoint can be selected."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request an evaluation after the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class StopEarly(EarlyStoppingCallback):
    """Early stopping whose count of validations without improvement survives a resume."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop at once where the run had stopped already."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
