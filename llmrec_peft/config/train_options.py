"""Options of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec_peft.errors import ConfigError
from llmrec_peft.evaluation.metrics import higher_is_better
from llmrec_peft.fields import MAX_COUNT, MAX_SEED, MAX_TOKENS, check_fields, number, require


@dataclass(kw_only=True)
class TrainConfig:
    """Training."""

    max_steps: int = number(-1, 1, MAX_COUNT, also=(-1,))
    """Number of optimizer steps; -1 to train for `epochs`."""
    epochs: float = number(1.0, 0, 1e6, above=True)
    """Number of passes over the training targets, used if max_steps is -1."""
    batch_size: int = number(8, 1, 1_000_000)
    """Streams per optimizer step, summed over all processes and accumulation steps."""
    micro_tokens: int = number(1200, 1, MAX_TOKENS)
    """Maximum tokens per forward pass; sets memory and speed, does not change the gradient."""
    learning_rate: float = number(3e-4, 0, 100, above=True)
    """Peak learning rate."""
    weight_decay: float = number(0.0, 0, 1000)
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    """Optimizer."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule after warm-up."""
    warmup: float = number(0.05, 0, 1, below=True)
    """Fraction of the steps used for linear learning-rate warm-up."""
    max_grad_norm: float = number(1.0, 0, 1e9)
    """Maximum gradient norm for clipping; 0 disables clipping."""
    loss: Literal["cross_entropy", "focal", "listwise"] = "cross_entropy"
    """Loss: cross-entropy, focal loss, or listwise softmax over the events of one candidate set."""
    class_weights: Literal["balanced"] | list[float] | None = number(None, 0, 1e6)
    """Class weights in the loss: balanced, one number per class, or null."""
    focal_gamma: float = number(2.0, 0, 100)
    """Gamma of the focal loss."""
    label_smoothing: float = number(0.0, 0, 1, below=True)
    """Label smoothing factor."""
    eval_steps: int = number(0, 0, MAX_COUNT)
    """Steps between validations; 0 validates at the end only."""
    save_steps: int = number(0, 0, MAX_COUNT)
    """Steps between checkpoints; 0 saves only those that model selection needs."""
    select_metric: str = "logloss"
    """Validation metric for checkpoint selection and early stopping."""
    early_stopping: int = number(0, 0, MAX_COUNT)
    """Validations without improvement before training stops; 0 disables early stopping."""
    seed: int = number(0, 0, MAX_SEED)
    """Random seed of data order, dropout and new weights."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers, by the names that Transformers' Trainer uses; [] for none."""
    logging_steps: int = number(5, 1, MAX_COUNT)
    """Steps between log entries."""
    resume: bool = False
    """Resume from the last checkpoint in output_dir."""

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
