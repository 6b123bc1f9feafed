"""Which streams make up each global batch, and which rank takes which of them."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler, DataLoader


class GlobalBatchSampler(BatchSampler):
    """Global batches of streams, drawn without replacement in an order fixed by seed and epoch.

    Each global batch is dealt to the ranks by length, longest first and there and back, so that ranks get like numbers
    of tokens. The batch itself does not depend on the number of ranks, nor on how a rank cuts its share up.

    Args:
        lengths: int [streams], tokens of each.
        batch_size: streams in a global batch; the epoch's last one holds what is left.
        seed: of the order.
        rank, world: this process and how many there are.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, rank: int = 0, world: int = 1):
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
            batch = batch[np.argsort(-self.lengths[batch], kind="stable")]
            turn = np.arange(len(batch)) % (2 * self.world)
            dealt = np.where(turn < self.world, turn, 2 * self.world - 1 - turn)
            yield batch[dealt == self.rank].tolist()


class EpochDataLoader(DataLoader):
    """A data loader that hands the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.batch_sampler.set_epoch(epoch)
