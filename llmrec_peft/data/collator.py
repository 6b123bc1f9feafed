"""Collate streams into micro-batches of tensors, grouped by length so that little of them is padding."""

from typing import Any

import numpy as np
import torch

from llmrec_peft.data.batches import PAD, plan_micro_batches
from llmrec_peft.data.layout import Stream

MicroBatch = dict[str, Any]
"""Tensors by name, as `collate` makes them; None where a model needs no such tensor."""


def collate(streams: list[Stream], pad_token_id: int, *, padding_side: str = "right", mask: bool = False) -> MicroBatch:
    """Collate B streams, padded to the longest of L tokens, with T targets in all.

    Args:
        streams: at least one.
        pad_token_id: id of padding.
        padding_side: under causal attention, right padding needs no mask and left padding does.
        mask: always give the 2-D mask, which bidirectional models need.

    Returns:
        input_ids, position_ids int64 [B, L]; attention_mask int64 [B, L] or None; segment int64 [B, L], or None if no
        stream has a candidate and plain causal attention suffices; markers (flat index b * L + l), labels, groups (list
        numbers from 0) and targets, each int64 [T].
    """
    length = max(len(stream) for stream in streams)
    shape = (len(streams), length)
    ids, positions = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    segment, seen = np.full(shape, PAD, np.int64), np.zeros(shape, np.int64)
    markers, sets = [], []
    for row, stream in enumerate(streams):
        begin = length - len(stream) if padding_side == "left" else 0
        span = slice(begin, begin + len(stream))
        ids[row, span], positions[row, span] = stream.input_ids, stream.position_ids
        segment[row, span], seen[row, span] = stream.segment, 1
        markers.append(stream.markers + row * length + begin)
        # Two windows may share a candidate set; within a batch, the part in each window is one group.
        sets.append(np.stack([np.full_like(stream.candidate_sets, row), stream.candidate_sets]))
    keyed = np.concatenate(sets, axis=1)
    groups = np.unique(keyed, axis=1, return_inverse=True)[1].reshape(-1) if keyed.size else np.empty(0, np.int64)
    needs_mask = mask or (padding_side == "left" and not seen.all())
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": torch.from_numpy(seen) if needs_mask else None,
        "segment": torch.from_numpy(segment) if (segment > 0).any() else None,
        "markers": torch.from_numpy(np.concatenate(markers).astype(np.int64)),
        "labels": torch.from_numpy(np.concatenate([stream.labels for stream in streams]).astype(np.int64)),
        "groups": torch.from_numpy(groups.astype(np.int64)),
        "targets": torch.from_numpy(np.concatenate([stream.targets for stream in streams]).astype(np.int64)),
    }


class StreamCollator:
    """Turns a list of streams into micro-batches that each hold at most `max_tokens` tokens.

    Called with streams, it returns {"micro_batches": [see :func:`collate`]}. The Trainer runs them one by one and steps
    after the last: tokens bound the memory, and the batch size stays as configured.
    """

    def __init__(self, pad_token_id: int, max_tokens: int, *, padding_side: str = "right", mask: bool = False) -> None:
        self.pad_token_id, self.max_tokens = pad_token_id, max_tokens
        self.padding_side, self.mask = padding_side, mask

    def __call__(self, streams: list[Stream]) -> dict[str, list[MicroBatch]]:
        groups = plan_micro_batches(np.array([len(stream) for stream in streams]), self.max_tokens)
        return {"micro_batches": [self.one([streams[row] for row in group]) for group in groups]}

    def one(self, streams: list[Stream]) -> MicroBatch:
        """All streams as one micro-batch."""
        return collate(streams, self.pad_token_id, padding_side=self.padding_side, mask=self.mask)
