"""What the trainer's tests and the script for several processes share: one small problem, trained by one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from llmrec_peft.checkpoints.loading import load_classifier
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import StreamSubset, build_streams
from llmrec_peft.training.distributed import device_arguments
from llmrec_peft.training.losses import BehaviorLoss
from llmrec_peft.training.trainer import BehaviorTrainer
from tests.conftest import make_small_tables

DOMAIN = {
    "name": "movies",
    "header": "Movies one viewer rated:\n",
    "event": "{title}",
    "outcomes": {"dislike": " no\n", "like": " yes\n"},
    "label": {"column": "rating", "above": 3},
    "simultaneous": "isolate",
    "negatives": {"per_positive": 1},
    "stream": {"context": 2, "targets": 3, "max_length": 300},
}
LEARNING_RATE = 0.05
BATCH = 8  # streams in a global batch
# Options of each tuning method, small.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "adapter": {"size": 8},
    "head": {},
    "full": {},
}
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "weighted": {"class_weights": [0.7, 1.9], "label_smoothing": 0.1},
    "focal": {"name": "focal", "class_weights": [1.5, 0.5]},
    "listwise": {"name": "listwise"},
}

# Runs that must end alike however they are split; the settings are those of one process.
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "full": {"method": "full", "learning_rate": 0.005},
    **{loss: {"loss": loss, "micro_tokens": 200} for loss in LOSSES if loss != "cross_entropy"},
    "bfloat16 base": {"options": {"dtype": "bfloat16"}},
    "activation checkpointing": {"options": {"activation_checkpointing": True}},
    "clipped AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 0.5, "loss": "weighted"},
    "a last batch of one stream": {
        "windows": 7,
        "per_device_train_batch_size": 6,
        "num_train_epochs": 1,
        "max_steps": -1,
    },
}


def shared_out(settings: dict[str, Any], processes: int, accumulation: int = 1) -> dict[str, Any]:
    """The same run with each global batch cut into `processes` x `accumulation` parts."""
    batch = settings.get("per_device_train_batch_size", BATCH)
    cut = {"per_device_train_batch_size": batch // (processes * accumulation)}
    return {**settings, **cut, "gradient_accumulation_steps": accumulation}


def splits():
    """Splits of a log of eight users."""
    interactions, items = make_small_tables(users=8, events=10)
    return BehaviorLog(interactions, items, name="small").split()


def arguments(directory: str | Path, **changes: Any) -> TrainingArguments:
    """Plain SGD without clipping, so that weights show gradients as they are."""
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": 4,
        "learning_rate": LEARNING_RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 3,
        **device_arguments(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(directory), **{**settings, **changes})


def make_trainer(base, tokenizer, directory, *, streams=None, windows=None, method="lora", options=None,
                 loss="cross_entropy", micro_tokens=400, **changes) -> BehaviorTrainer:  # fmt: skip
    """A trainer of a tiny classifier on the first `windows` streams; `changes` are arguments, or the trainer's."""
    torch.manual_seed(0)
    domain = Domain.from_dict(DOMAIN)
    own = {key: changes.pop(key) for key in ("valid_streams", "compute_metrics", "callbacks") if key in changes}
    settings = arguments(directory, **changes)  # before the base is loaded, since ZeRO-3 splits it while it is
    classifier = load_classifier(str(base), domain, method, **{**METHODS[method], **(options or {})})
    streams = build_streams(splits().train, domain, tokenizer) if streams is None else streams
    return BehaviorTrainer(
        classifier,
        settings,
        streams if windows is None else StreamSubset(streams, np.arange(windows)),
        tokenizer=tokenizer,
        micro_tokens=micro_tokens,
        loss=BehaviorLoss(**LOSSES[loss]),
        **own,
    )


def trained(trainer: BehaviorTrainer) -> dict[str, np.ndarray]:
    """Trained tensors, as arrays of their own."""
    return {name: value.numpy(force=True).copy() for name, value in trainer.model.trainable_state_dict().items()}


def losses_of(trainer: BehaviorTrainer) -> list[float]:
    """Logged loss of each step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def gap(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest and mean signed difference over all tensors; a lost factor shows in the mean."""
    assert one.keys() == other.keys()
    flat = np.concatenate([(one[name] - other[name]).ravel() for name in one])
    return float(np.abs(flat).max()), float(flat.mean())
