"""Trainers that are measured, the bundles of other benchmarks, and the operations of a training step.

Operations a token: frozen weights (N, without embeddings) take a forward pass and a backward pass to their inputs,
trained ones (A) a backward pass to themselves too: 4 N + 6 A. Scoring takes 2 N, as the adapter is merged into the
weights. Attention takes 4 d for each pair of tokens that the mask allows and each layer, d being heads * head size, and
twice that backward. All count the last layer whole, though it runs at the markers alone, so shares are too high by up
to one part in the number of layers.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.measuring import memory_mib, reset_peak
from llmrec_peft import BehaviorTrainer, Domain, load_classifier
from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.data.streams import StreamSubset

RANK = 16
SILENT = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
          "dataloader_pin_memory": False, "lr_scheduler_type": "constant", "num_train_epochs": 1}  # fmt: skip
"""Arguments of a Trainer that is measured: one epoch, a constant learning rate, nothing saved or logged."""


# -- trainers --------------------------------------------------------------------------------------


class StepClock(transformers.TrainerCallback):
    """Seconds from the start of the first epoch to the end of the last step; set-up does not count."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start once."""
        if not self.steps:
            self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop, until the end of the next step."""
        self.steps += 1
        self.seconds = time.perf_counter() - self._start


class PositionCounter:
    """Counts the positions that a model computes in training, padding included, at its embedding."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module, inputs, output) -> None:
        self.count += inputs[0].numel() if module.training else 0


def training_arguments(scratch: str | Path, **changes: Any) -> transformers.TrainingArguments:
    """Arguments of a BehaviorTrainer that is measured."""
    arguments = {"output_dir": str(scratch), "remove_unused_columns": False, **SILENT, **changes}
    return transformers.TrainingArguments(**arguments)


def behavior_trainer(classifier, arguments, windows, micro_tokens: int, *callbacks: Any) -> BehaviorTrainer:
    """A BehaviorTrainer that prints nothing."""
    trainer = BehaviorTrainer(classifier, arguments, windows, tokenizer=classifier.tokenizer, micro_tokens=micro_tokens,
                              callbacks=list(callbacks))  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train_timed(trainer, clock: StepClock, counter: PositionCounter, targets: int, tokens: int) -> dict:
    """Train; time, throughput, padding and peak memory."""
    reset_peak()
    before = counter.count
    trainer.train()
    computed, seconds = counter.count - before, clock.seconds
    return {
        "targets": targets, "tokens": tokens, "computed_tokens": computed, "steps": clock.steps, "seconds": seconds,
        "targets_per_s": targets / seconds, "tokens_per_s": tokens / seconds, "tokens_per_target": tokens / targets,
        "padding": 1 - tokens / computed, "peak_rss_mib": memory_mib(),
    }  # fmt: skip


def train_streams(classifier, windows: StreamSubset, steps: int, options: argparse.Namespace, scratch: Path) -> dict:
    """One epoch of `windows` in `steps` steps through BehaviorTrainer."""
    clock, counter = StepClock(), PositionCounter(classifier.stock)
    arguments = training_arguments(scratch, per_device_train_batch_size=-(-len(windows) // steps),
                                   learning_rate=options.learning_rate, seed=options.seed)  # fmt: skip
    trainer = behavior_trainer(classifier, arguments, windows, options.micro_tokens, clock)
    targets = int(np.diff(windows.parent.target_offsets)[windows.windows].sum())
    return train_timed(trainer, clock, counter, targets, int(windows.lengths.sum()))


def warm_up(classifier) -> None:
    """One step on 64 tokens."""
    trained = [parameter for parameter in classifier.train().parameters() if parameter.requires_grad]
    classifier(input_ids=torch.zeros(1, 64, dtype=torch.int64), markers=torch.tensor([63])).sum().backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained).step()


def make_bundle(directory: Path | str, base: str, domain: Domain, method: str = "lora", seed: int = 0, **load) -> Path:
    """A bundle whose trained weights were moved by seeded noise, as training might have."""
    torch.manual_seed(seed)
    classifier, generator = load_classifier(base, domain, method, **load), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in classifier.parameters():
            if value.requires_grad:
                value.add_(0.1 * value.std().clamp(min=0.01) * torch.randn(value.shape, generator=generator))
    return save_bundle(directory, classifier, classifier.tokenizer, domain.to_dict())


# -- operations ------------------------------------------------------------------------------------


def matmul_rate(sizes: list[int], operations: float = 1.4e11) -> float:
    """Best float32 operations a second of torch.mm on square matrices; a product of n x n matrices takes 2 n^3."""
    rates = []
    for size in sizes:
        a, b = torch.rand(size, size), torch.rand(size, size)
        out = torch.mm(a, b)
        repeats = min(100, max(1, round(operations / (2 * size**3))))
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        rates.append(repeats * 2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def flops_per_token(classifier) -> dict[str, float]:
    """N, A and 4 N + 6 A of the module's docstring."""
    trained, total = classifier.trainable_parameters()
    frozen_head = sum(p.numel() for p in classifier.head.parameters() if not p.requires_grad)
    embeddings = sum(p.numel() for p in classifier.stock.get_input_embeddings().parameters())
    base = total - trained - embeddings - frozen_head
    return {"base_parameters": base, "trained_parameters": trained, "flops_per_token": 4 * base + 6 * trained}


def attention_flops(positions: np.ndarray, config, *, training: bool) -> float:
    """Operations of attention's two products for tokens at `positions`, int [L], in the order of the model's input.

    A token at position p sees itself and the p tokens before it on its path, whatever candidates lie between: p + 1
    pairs.
    """
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    pairs = float((np.asarray(positions, np.int64) + 1).sum())
    return (3 if training else 1) * 4 * width * pairs * text.num_hidden_layers
