"""Answers of a classifier on a data set of streams."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from llmrec_peft.data.batches import plan_micro_batches
from llmrec_peft.data.collator import StreamCollator
from llmrec_peft.data.layout import StreamRows
from llmrec_peft.errors import ModelError
from llmrec_peft.models.classifier import BehaviorClassifier
from llmrec_peft.models.selftest import check_streams


@dataclass(frozen=True)
class Predictions:
    """Answers in the order of target numbers.

    Attributes:
        targets: int64 [n], numbers of the data set's targets, ascending.
        labels: int64 [n], true classes.
        logits: float32 [n, labels].
    """

    targets: np.ndarray
    labels: np.ndarray
    logits: np.ndarray


def predict(
    model: torch.nn.Module,
    streams: StreamRows,
    collator: StreamCollator,
    *,
    batch_tokens: int,
    processes: PartialState | None = None,
    description: str | None = None,
) -> Predictions:
    """Answer every target of `streams`, whatever the batch size.

    Args:
        model: a `BehaviorClassifier`, or a wrapper around one.
        streams: a data set with `lengths` whose items are streams.
        collator: how streams become tensors.
        batch_tokens: tokens in a padded batch, at most.
        processes: with several ranks, each answers its share and all ranks get the whole.
        description: shows a progress bar under this name.

    Raises:
        ModelError: an answer is not a finite number, or the base cannot answer such streams (`check_streams`).
    """
    if isinstance(model, BehaviorClassifier):
        check_streams(model, streams)
    batches = plan_micro_batches(streams.lengths, batch_tokens)
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    parts = []
    try:
        # Not inference mode: what shards and gathers weights could not write to tensors made in it.
        with torch.no_grad():
            # Every rank runs the same number of forward passes: sharded models gather weights in each.
            for start in tqdm(range(0, len(batches), world), desc=description, disable=not description or rank > 0,
                              unit="batch"):  # fmt: skip
                own = start + rank < len(batches)
                batch = collator.one([streams[int(row)] for row in batches[start + rank if own else start]])
                inputs = {key: value.to(device) for key, value in batch.items() if value is not None}
                logits = model(**inputs).float().cpu().numpy()
                if own:
                    parts.append((batch["targets"].numpy(), batch["labels"].numpy(), logits))
    finally:
        model.train(training)
    if world > 1:
        parts = gather_object(parts)
    targets, labels, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(targets, kind="stable")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits).all(1)).sum())
        raise ModelError(f"{bad} of {len(logits)} answers are not finite; lower the learning rate or check the weights")
    return Predictions(targets[order], labels[order], logits[order])
