"""What each launch of benchmarks/invariance.py runs: all its cases, trained one after another on every process.

Its one argument is JSON, written by invariance.py. The launch of one process leaves its trained tensors; every other
compares its own with them. Each process writes what it found to `<output>.<rank>.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from measuring import quiet, release_memory, stop
from peers.plain import PromptDataset, load_plain, plain_trainer
from train_speed import PlainSide, targets_of

from llmrec_peft.config.schema import DataConfig, TrainRecipeConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.errors import ConfigError, LLMRecError
from llmrec_peft.models.base import load_tokenizer, resolve_base
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.models.sharding import assign, whole
from llmrec_peft.runs.launch_checks import check_launch
from llmrec_peft.runs.split_streams import read_log, split_by_domain, streams_for_split
from llmrec_peft.training.distributed import device_arguments, distributed_session
from llmrec_peft.training.losses import BehaviorLoss
from llmrec_peft.training.trainer import BehaviorTrainer

Tensors = dict[str, torch.Tensor]
STREAM = {"context": 2, "targets": 3, "max_length": 1000}
NEGATIVES = {"per_positive": 1}  # so that there are lists, and streams of unequal numbers of targets
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
"""Plain SGD without clipping: weights show gradients as they are, where Adam and clipping would hide a factor."""


class FirstStep(transformers.TrainerCallback):
    """Length of the change that the first step makes: by SGD that of the gradient, times the learning rate."""

    def __init__(self, trained: dict[str, torch.nn.Parameter], start: Tensors):
        self.trained, self.start, self.length = trained, start, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Measure once; all ranks together, as ZeRO-3 has split the tensors."""
        if state.global_step == 1:
            self.length = moved(self.start, whole_tensors(self.trained))["moved"]


class Launch:
    """One launch: the data that all have in common, and this one's way of cutting a batch up."""

    def __init__(self, settings: dict[str, Any], state: PartialState):
        self.settings, self.state = settings, state
        self.base = resolve_base(settings["base"])
        self.domain = small_domain(settings["domain"])
        split = split_by_domain(read_log(DataConfig(path=settings["data"])), self.domain)
        self.train = streams_for_split(split, "train", self.domain, load_tokenizer(self.base))
        self.windows = draw_windows(self.train, settings["steps"], settings["batch"], settings["seed"])

    def share(self, batch: int) -> int:
        """Of a global batch, what one process takes at a time."""
        return batch // (self.settings["accumulation"] * self.state.num_processes)

    def arguments(self) -> transformers.TrainingArguments:
        """Of both sides: Trainer's arguments for this launch."""
        return transformers.TrainingArguments(
            output_dir=self.settings["scratch"], max_steps=self.settings["steps"],
            per_device_train_batch_size=self.share(self.settings["batch"]),
            gradient_accumulation_steps=self.settings["accumulation"], learning_rate=self.settings["learning_rate"],
            seed=self.settings["seed"], save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, ddp_find_unused_parameters=False,
            **SGD, **device_arguments(),
        )  # fmt: skip

    def ours(self, case: dict[str, Any]) -> dict[str, Any]:
        """Train by the package, or say why it refuses to."""
        arguments = self.arguments()  # before the base is loaded, since ZeRO-3 splits it while it is
        try:
            check_launch(self.config(case["method"]), arguments)
        except ConfigError as error:
            return {"refused": str(error)}
        torch.manual_seed(self.settings["seed"])
        classifier = load_classifier(self.base, self.domain, case["method"])
        trainer = BehaviorTrainer(
            classifier, arguments, self.windows, tokenizer=classifier.tokenizer,
            micro_tokens=self.settings["micro_tokens"], loss=self.loss(case["loss"]),
        )  # fmt: skip
        start = copied(classifier.trainable_state_dict())
        trainer.train()
        return self.compare(case["name"], start, copied(classifier.trainable_state_dict()))

    def config(self, method: str) -> TrainRecipeConfig:
        """What a recipe of this method would check its launch by."""
        kind = next(kind for kind in TrainRecipeConfig.__subclasses__() if kind.method_name == method)
        return kind(data=DataConfig(path=self.settings["data"]), domain=self.domain)

    def loss(self, name: str) -> BehaviorLoss:
        """A loss of invariance.py's list."""
        if name == "weighted":
            return BehaviorLoss(class_weights=np.linspace(0.7, 1.9, len(self.domain.labels)).tolist())
        return BehaviorLoss(name)

    def plain(self, case: dict[str, Any]) -> dict[str, Any]:
        """Train the peer on the same targets, in the order of the windows."""
        held = self.arguments()  # kept while the base is loaded, for ZeRO-3
        model, tokenizer = load_plain(self.base, len(self.domain.labels), seed=self.settings["seed"])
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        start = self.common_start(case["name"], trained)
        prompts = self.prompts(model, tokenizer)
        trainer, clock = plain_trainer(
            model, tokenizer, prompts, held.output_dir, learning_rate=held.learning_rate,
            batch_size=self.share(len(prompts) // self.settings["steps"]), accumulation=self.settings["accumulation"],
            train_sampling_strategy="sequential", **SGD, **device_arguments(),
        )  # fmt: skip
        first = FirstStep(trained, start)
        trainer.add_callback(first)
        trainer.train()
        if clock.steps != self.settings["steps"]:
            stop(f"the plain Trainer took {clock.steps} steps instead of {self.settings['steps']}")
        return {"first_step": first.length, **self.compare(case["name"], start, whole_tensors(trained))}

    def prompts(self, model, tokenizer) -> PromptDataset:
        """All targets of the windows, a text each."""
        return PlainSide(model, tokenizer, None, "").prompts(self.windows, np.arange(targets_of(self.windows)))

    def common_start(self, name: str, trained: dict[str, torch.nn.Parameter]) -> Tensors:
        """Give the peer the first weights that it had in one process, since PEFT's depend on how they are made."""
        file = Path(self.settings["reference"], f"{name}.start.safetensors")
        if self.settings["is_reference"]:
            safetensors.torch.save_file(whole_tensors(trained), file)
        start = safetensors.torch.load_file(file)
        for key, value in trained.items():
            assign(value, start[key])
        return start

    def compare(self, name: str, start: Tensors, end: Tensors) -> dict[str, Any]:
        """How far the tensors moved, and how far they ended from those of one process."""
        file = Path(self.settings["reference"], f"{name}.safetensors")
        if self.settings["is_reference"]:
            safetensors.torch.save_file(end, file)
        found = moved(start, end)
        start.clear()  # makes room for the tensors of one process
        return {**found, **differences(safetensors.torch.load_file(file), end)}


def small_domain(path: str) -> Domain:
    """The domain of a file, with small windows and sampled negatives."""
    return Domain.from_dict({**Domain.from_yaml(path).to_dict(), "stream": STREAM, "negatives": NEGATIVES})


def draw_windows(train: StreamDataset, steps: int, batch: int, seed: int) -> StreamSubset:
    """`steps * batch` windows of unequal numbers of targets, whose sum can be cut into steps and quarters alike."""
    counts = np.diff(train.target_offsets)
    rare = 1 / np.bincount(counts)[counts]  # each number of targets is as likely as any other
    rng = np.random.default_rng(seed)
    needed = steps * batch
    if len(train) >= needed:
        for _ in range(1000):
            windows = rng.choice(len(train), needed, replace=False, p=rare / rare.sum())
            total = counts[windows].sum()
            if total % (4 * steps) == 0 and len(set(counts[windows])) > 1:
                return StreamSubset(train, np.sort(windows))
    stop(f"the log's {len(train)} windows hold no {needed} whose targets can be cut alike; give a larger log")


def copied(tensors: Tensors) -> Tensors:
    """Whole copies on the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def whole_tensors(trained: dict[str, torch.nn.Parameter]) -> Tensors:
    """Copies of parameters that ZeRO-3 may have split."""
    return copied({name: whole(value) for name, value in trained.items()})


def moved(start: Tensors, end: Tensors) -> dict[str, float]:
    """The largest change of a number, and the length of the whole change, also as a part of the length at the start."""
    change = sum(float((end[name] - start[name]).double().square().sum()) for name in end) ** 0.5
    size = sum(float(value.double().square().sum()) for value in start.values()) ** 0.5
    return {
        "moved_max": max(float((end[name] - start[name]).abs().max()) for name in end),
        "moved": change,
        "moved_relative": change / size,
    }


def differences(one: Tensors, other: Tensors) -> dict[str, float]:
    """Largest absolute and mean signed difference, `other` less `one`, over all numbers of all tensors."""
    if one.keys() != other.keys():
        stop(f"trained tensors are not the same: {min(one.keys() ^ other.keys())} is missing on one side")
    gaps = [other[name].double() - one[name].double() for name in one]
    largest = torch.stack([gap.abs().max() for gap in gaps]).max()  # keeps a NaN, which Python's max may lose
    count = sum(gap.numel() for gap in gaps)
    return {"max": float(largest), "mean": float(sum(gap.sum() for gap in gaps)) / count, "numbers": count}


def main() -> None:
    """Train the cases and write what was found."""
    settings = json.loads(sys.argv[1])
    found: dict[str, Any] = {"cases": {}}
    with quiet():
        try:
            with distributed_session() as state:
                launch = Launch(settings, state)
                for case in settings["cases"]:
                    train = launch.plain if case["method"] == "plain" else launch.ours
                    found["cases"][case["name"]] = train(case)
                    release_memory()
        except LLMRecError as error:
            stop(str(error))
    counts = np.diff(launch.train.target_offsets)[launch.windows.windows]
    found["data"] = {
        "log": launch.train.log.name,
        "streams": len(launch.windows),
        "targets": counts.tolist(),
        "tokens": launch.windows.lengths.tolist(),
    }
    found["world"] = state.num_processes
    Path(f"{settings['output']}.{state.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
