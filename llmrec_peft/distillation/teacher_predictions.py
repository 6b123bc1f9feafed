"""Running a teacher on the training targets, once: predictions that are cached are read, the others are computed.

Shape letters: N targets of a shard, C labels, K layers, H the teacher's hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.streams import IndependentPrompts, StreamDataset, StreamSubset
from llmrec_peft.distillation.hidden_states import LayerOutputs
from llmrec_peft.distillation.prediction_shards import MAX_LOGIT, PredictionShards
from llmrec_peft.distillation.teacher_outputs import TeacherPredictions
from llmrec_peft.errors import ModelError
from llmrec_peft.evaluation.calibration import Calibration

SHARD_TOKENS = 60_000
"""Tokens of the windows of one shard: the most work that is lost if a process is killed."""


def teacher_predictions(
    teacher: Bundle,
    streams: StreamDataset | StreamSubset,
    directory: str | Path,
    *,
    layers: Sequence[int] = (),
    batch_tokens: int = 4000,
    processes: PartialState | None = None,
) -> TeacherPredictions:
    """Predictions of `teacher` for all targets of `streams`: cached ones are read, the others computed and cached.

    Args:
        teacher: a bundle or a merged model, from `load_trained`.
        streams: built by the teacher's domain and tokenizer.
        directory: the cache; one for each teacher and split.
        layers: numbers of the layers whose outputs to cache, -1 for the input of the head.
        batch_tokens: tokens of one forward pass, at most.
        processes: with several ranks, each computes every n-th shard; all must share `directory`.

    Raises:
        DataError: `directory` caches another teacher or other targets, or holds a truncated or edited shard.
        ModelError: a logit, or a hidden state in float16, is not finite.
    """
    num_labels = len(teacher.classifier.labels)
    shards = PredictionShards(Path(directory), teacher.manifest, streams.parent, num_labels, tuple(layers))
    state = processes or PartialState()
    if not shards.check() and state.is_main_process:
        shards.create()
    state.wait_for_everyone()
    missing = np.setdiff1d(streams.windows, shards.read().windows)
    if len(missing):
        _predict_windows(teacher, shards, missing, batch_tokens, state)
    state.wait_for_everyone()
    return shards.read().predictions


def _predict_windows(
    teacher: Bundle, shards: PredictionShards, windows: np.ndarray, batch_tokens: int, state: PartialState
) -> None:
    """Predict the targets of some windows and write them, shard by shard."""
    streams = shards.streams
    # Windows of similar length share a shard, longest first, so that batches have little padding.
    order = windows[np.argsort(-streams.lengths[windows], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(np.cumsum(streams.lengths[order]) // SHARD_TOKENS)) + 1)
    own = groups[state.process_index :: state.num_processes]
    total = sum(len(group) for group in own)
    with tqdm(total=total, desc="teacher", unit="window", disable=not state.is_main_process) as bar:
        for group in own:
            found = _predict(teacher, StreamSubset(streams, group), shards.layers, batch_tokens, bar)
            shards.write(group, found.targets, found.logits, found.hidden)


@dataclass(frozen=True)
class _ShardPredictions:
    targets: np.ndarray  # int64 [N]
    logits: np.ndarray  # float32 [N, C], calibrated
    hidden: np.ndarray | None  # float16 [N, K, H]


@torch.no_grad()
def _predict(
    teacher: Bundle, streams: StreamSubset, layers: tuple[int, ...], batch_tokens: int, bar: tqdm
) -> _ShardPredictions:
    """Calibrated logits, and the outputs of `layers`, for all targets of some windows."""
    classifier = teacher.classifier.eval()
    collator = StreamCollator(teacher.tokenizer.pad_token_id, batch_tokens, mask=classifier.encoder)
    # An encoder has one prediction a row, so each target becomes a prompt of its own.
    rows = IndependentPrompts(streams) if classifier.encoder else streams
    targets, logits, hidden = [], [], []
    with LayerOutputs(classifier, layers) as outputs:
        for group in plan_micro_batches(rows.lengths, batch_tokens):
            batch = collator.one([rows[int(row)] for row in group])
            inputs = {key: value.to(classifier.device) for key, value in batch.items() if value is not None}
            found = classifier(**inputs)
            targets.append(batch["targets"].numpy())
            logits.append(found.float().cpu().numpy())
            if layers:
                hidden.append(outputs.at(inputs["markers"]).half().cpu().numpy())
            bar.update(len(group) if rows is streams else len(group) * len(streams) / len(rows))
    calibrated = Calibration.from_dict(teacher.calibration).shift(np.concatenate(logits)).astype(np.float32)
    if not (np.abs(calibrated) <= MAX_LOGIT).all():
        raise ModelError(f"the teacher gives logits that are not finite, or above {MAX_LOGIT:g}; check its weights")
    # float16 ends at 65,504: a layer with larger outputs overflows to infinity.
    if layers and not all(np.isfinite(part).all() for part in hidden):
        raise ModelError(
            f"the teacher gives hidden states in layers {list(layers)} that are not finite in float16; choose other "
            "layers, or check its weights"
        )
    return _ShardPredictions(np.concatenate(targets), calibrated, np.concatenate(hidden) if layers else None)
