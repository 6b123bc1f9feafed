"""Micro-batches: every row once, under the limit, little padding; tensors that hold what the streams hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrec_peft.data.batches import PAD, plan_micro_batches
from llmrec_peft.data.collator import StreamCollator, collate
from llmrec_peft.data.layout import Stream


def stream(length, *, candidate=0, seed=0, markers=None, target=0):
    """A stream of random tokens whose last `candidate` tokens are a candidate."""
    rng = np.random.default_rng([seed, length])
    segment = np.zeros(length, np.int32)
    if candidate:
        segment[-candidate:] = 1
    markers = np.array([length - 1] if markers is None else markers)
    count = len(markers)
    return Stream(rng.integers(5, 99, length).astype(np.int32), np.arange(length, dtype=np.int32), segment, markers,
                  rng.integers(0, 2, count), np.arange(count) // 2, np.arange(target, target + count))  # fmt: skip


@pytest.mark.parametrize("limit", [1, 50, 400, 1200, 10**6])
@pytest.mark.parametrize("count", [0, 1, 2, 77])
def test_plan_covers_every_row_once_under_the_limit(limit, count):
    lengths = np.random.default_rng(count).integers(1, 500, count)
    groups = plan_micro_batches(lengths, limit)
    assert sorted(row for group in groups for row in group) == list(range(count))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= limit
    # A group is as large as the limit allows: the next row would not have fitted.
    for group, following in zip(groups, groups[1:], strict=False):
        assert (len(group) + 1) * lengths[group].max() > limit and lengths[group].min() >= lengths[following].max()


@pytest.mark.parametrize("shape", ["lognormal", "mostly full windows"])
def test_padding_is_under_five_percent(shape):
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(5.8, 0.5, 4000).clip(30, 1024).astype(int)
    if shape != "lognormal":
        lengths[:3000] = rng.integers(850, 1024, 3000)
    padded = sum(len(group) * lengths[group].max() for group in plan_micro_batches(lengths, 4000))
    assert 1 - lengths.sum() / padded < 0.05


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_keeps_every_stream(side):
    streams = [stream(5, target=0), stream(9, candidate=3, markers=[4, 8], target=1), stream(2, target=3)]
    batch = collate(streams, 77, padding_side=side)
    assert batch["input_ids"].shape == (3, 9) and batch["targets"].tolist() == [0, 1, 2, 3]
    answer = 0
    for row, one in enumerate(streams):
        span = slice(0, len(one)) if side == "right" else slice(9 - len(one), 9)
        outside = np.ones(9, bool)
        outside[span] = False
        assert batch["input_ids"][row, span].tolist() == one.input_ids.tolist()
        assert batch["position_ids"][row, span].tolist() == one.position_ids.tolist()
        assert batch["segment"][row, span].tolist() == one.segment.tolist()
        assert (batch["input_ids"][row, outside] == 77).all() and (batch["segment"][row, outside] == PAD).all()
        if side == "left":
            assert batch["attention_mask"][row].tolist() == (~outside).astype(int).tolist()
        for number in range(len(one.markers)):
            place = int(batch["markers"][answer])
            assert divmod(place, 9) == (row, one.markers[number] + span.start)
            assert batch["input_ids"].flatten()[place] == one.input_ids[one.markers[number]]
            assert batch["labels"][answer] == one.labels[number]
            answer += 1
    assert all(value is None or value.dtype == torch.int64 for value in batch.values())


def test_plain_batches_need_no_mask_and_no_segment():
    streams = [stream(5), stream(9), stream(2)]
    right, left = (collate(streams, 0, padding_side=side) for side in ("right", "left"))
    assert right["segment"] is None and right["attention_mask"] is None
    assert left["segment"] is None and left["attention_mask"].sum() == 16
    assert collate(streams[:1], 0, padding_side="left")["attention_mask"] is None
    assert collate(streams, 0, mask=True)["attention_mask"].sum() == 16
    assert collate([*streams, stream(4, candidate=2)], 0)["segment"] is not None


def test_candidate_sets_of_different_streams_stay_apart():
    streams = [stream(9, markers=[1, 3, 5, 7, 8]), stream(6, markers=[1, 3, 5])]
    assert streams[0].candidate_sets.tolist() == [0, 0, 1, 1, 2] and streams[1].candidate_sets.tolist() == [0, 0, 1]
    assert collate(streams, 0)["groups"].tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


def test_the_collator_bounds_micro_batches():
    streams = [stream(length, target=number) for number, length in enumerate([30, 200, 31, 29, 90, 150, 5])]
    batches = StreamCollator(0, 200)(streams)["micro_batches"]
    assert sorted(target for batch in batches for target in batch["targets"].tolist()) == list(range(7))
    assert all(batch["input_ids"].numel() <= 200 for batch in batches) and len(batches) > 2
    assert len(StreamCollator(0, 10**6)(streams)["micro_batches"]) == 1
    assert StreamCollator(0, 200)([]) == {"micro_batches": []}
