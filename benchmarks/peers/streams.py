"""The package's side of compare_peers.py: windows through BehaviorTrainer, and targets as prompts of their own."""

import dataclasses
from typing import Any

import numpy as np
import torch
import transformers

from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.models.base import load_tokenizer
from llmrec_peft.models.classifier import load_classifier
from llmrec_peft.models.predict import predict
from llmrec_peft.runs.split_streams import SplitStreams, build_split_streams
from llmrec_peft.training.trainer import BehaviorTrainer

from .curves import Recorder


class TargetPrompts(torch.utils.data.Dataset):
    """Targets of a stream data set, by their numbers [n], each as a prompt with its whole history.

    Attributes:
        lengths: int64 [n], tokens of each.
    """

    def __init__(self, streams: StreamDataset, numbers: np.ndarray):
        windows = np.searchsorted(streams.target_offsets, numbers, "right") - 1
        made = {window: streams[int(window)] for window in np.unique(windows)}
        self.prompts = [
            made[window].independent(int(number - streams.target_offsets[window]), streams.vocabulary.suffix)
            for window, number in zip(windows, numbers, strict=True)
        ]
        self.lengths = np.array([prompt.input_ids.size for prompt in self.prompts])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int):
        return self.prompts[number]


def read_domain(path: str, context: int | None, targets: int | None) -> Domain:
    """A domain file, with other windows where they are given."""
    domain = Domain.from_yaml(path)
    changes = {key: value for key, value in (("context", context), ("targets", targets)) if value is not None}
    return dataclasses.replace(domain, stream=dataclasses.replace(domain.stream, **changes))


def read_splits(job: dict[str, Any]) -> SplitStreams:
    """The streams of a job's log: the same in every process."""
    return build_split_streams(
        BehaviorLog.read(job["data"]), Domain.from_dict(job["domain"]), load_tokenizer(job["base"])
    )


def train_streams(job: dict[str, Any], scratch: str) -> tuple[Recorder, dict[str, Any]]:
    """Train on the windows of a job until its budget is spent; the recorded curve, and what else to state."""
    splits, wanted = read_splits(job), np.array(job["validation"])
    torch.manual_seed(job["seed"])
    classifier = load_classifier(job["base"], splits.train.domain, "lora", r=job["r"], alpha=job["alpha"])
    collator = StreamCollator(classifier.tokenizer.pad_token_id, job["micro_tokens"])
    prompts = TargetPrompts(splits.valid, wanted)

    def answer() -> np.ndarray:
        # Of prompts, not of windows: 150 targets of many users lie in as many windows. The answers are the same.
        found = predict(classifier, prompts, collator, batch_tokens=job["micro_tokens"])
        logits = torch.from_numpy(found.logits[np.searchsorted(found.targets, wanted)])
        return logits.softmax(1).numpy()

    arguments = transformers.TrainingArguments(
        output_dir=scratch, num_train_epochs=1000, per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"], lr_scheduler_type="constant", save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, seed=job["seed"],
    )  # fmt: skip
    trainer = BehaviorTrainer(
        classifier, arguments, StreamSubset(splits.train, np.array(job["windows"])), tokenizer=classifier.tokenizer,
        micro_tokens=job["micro_tokens"],
    )  # fmt: skip
    recorder = Recorder(
        classifier.stock, answer, lambda steps: trainer.targets_seen, seconds=job["seconds"], steps=job["steps"],
        points=job["points"], at_targets=job["at_targets"],
    )  # fmt: skip
    trainer.add_callback(recorder)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return recorder, {"trained_parameters": classifier.trainable_parameters()[0]}
