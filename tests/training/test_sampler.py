"""Global batches: every stream once an epoch, the same for any number of ranks, dealt evenly."""

from __future__ import annotations

import numpy as np
import pytest

from llmrec_peft.training.sampler import GlobalBatchSampler

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = np.random.default_rng(0).integers(20, 900, 101)


def batches(world=1, epoch=0, seed=0, size=8, lengths=LENGTHS):
    """The global batches as one list of each rank's share."""
    samplers = [GlobalBatchSampler(lengths, size, seed, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return list(zip(*map(list, samplers), strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_stream_once_an_epoch_and_the_same_batches_for_any_ranks(world):
    alone, shared = batches(), batches(world)
    assert sorted(sum((shares[0] for shares in alone), [])) == list(range(101))
    assert [sorted(sum(shares, [])) for shares in shared] == [sorted(shares[0]) for shares in alone]
    assert len(shared) == len(GlobalBatchSampler(LENGTHS, 8, 0)) == 13
    assert all(len(shares[0]) == 8 for shares in alone[:-1]) and len(alone[-1][0]) == 5


def test_a_rank_may_have_nothing_of_a_small_last_batch():
    *full, last = batches(world=8)
    assert all(len(share) == 1 for shares in full for share in shares)
    assert sorted(map(len, last)) == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_like_numbers_of_tokens(world):
    for shares in batches(world, size=16)[:-1]:
        assert {len(share) for share in shares} == {16 // world}
        tokens = [LENGTHS[share].sum() for share in shares]
        assert max(tokens) - min(tokens) <= LENGTHS.max() - LENGTHS.min()
    spread = [
        np.ptp([LENGTHS[share].sum() for share in shares]) / LENGTHS.mean() for shares in batches(world, size=16)[:-1]
    ]
    assert np.mean(spread) < 1


def test_order_is_fixed_by_seed_and_epoch():
    first = batches()
    assert batches() == first
    assert batches(epoch=1) != first and batches(seed=1) != first and batches(epoch=1) != batches(seed=1)
    sampler = GlobalBatchSampler(LENGTHS, 8, 0)
    assert list(sampler) == list(sampler)
