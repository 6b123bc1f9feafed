"""Which streams make up each global batch, and which rank takes which of them."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler, DataLoader

from llmrec_peft.data.layout import Stream


class GlobalBatchSampler(BatchSampler):
    """Batches of stream numbers for one rank.

    The order of the streams depends on seed and epoch only, so each global batch is the same for every number of ranks
    and every micro-batch size. Its streams are dealt to the ranks by falling length, in the order 0, 1, ..., W-1, W-1,
    ..., 1, 0, so that the ranks get similar numbers of tokens.

    Args:
        lengths: int [streams], tokens of each.
        batch_size: streams in a global batch; the last one of an epoch may hold fewer.
        seed: random seed of the order.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world, self.epoch = rank, world, 0
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            batch = batch[np.argsort(-self.lengths[batch], kind="stable")]  # a stable sort: equal on every rank
            turn = np.arange(len(batch)) % (2 * self.world)
            rank_of = np.where(turn < self.world, turn, 2 * self.world - 1 - turn)  # int [streams of the batch]
            yield batch[rank_of == self.rank].tolist()


class EpochDataLoader(DataLoader[Stream]):
    """A data loader that passes the epoch to its batch sampler."""

    batch_sampler: GlobalBatchSampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.batch_sampler.set_epoch(epoch)
