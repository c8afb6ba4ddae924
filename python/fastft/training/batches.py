"""Which rows make which batch: a pure function of seed and epoch, so that a resumed run sees what is left of an epoch.

Under torchrun each process takes every n-th batch; the last ones are filled up with rows from the start, so that all
processes make the same number of steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


def order_of_epoch(num_rows: int, *, shuffle: bool, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch in their order; another one each epoch when shuffled."""
    if not shuffle:
        return list(range(num_rows))
    # Two seeds that differ must not meet in neighbouring epochs: seed 1 epoch 1 is not seed 2 epoch 0.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    return order


class EpochBatches(Sampler[list[int]]):
    """Batches of row numbers for one process; `set_epoch` chooses the order."""

    def __init__(
        self, num_rows: int, batch_size: int, *, shuffle: bool, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches that each process takes per epoch."""
        return math.ceil(math.ceil(self.num_rows / self.batch_size) / self.world)

    def __iter__(self) -> Iterator[list[int]]:
        order = order_of_epoch(self.num_rows, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)
        if self.world > 1:
            wanted = len(self) * self.world * self.batch_size
            order = (order * (wanted // len(order) + 1))[:wanted]
        for index in range(len(self)):
            start = (index * self.world + self.rank) * self.batch_size
            yield order[start : start + self.batch_size]


class EpochLoader(DataLoader[Any]):
    """A DataLoader that hands `set_epoch` on, and draws nothing from torch's global random numbers.

    (A plain one draws a seed at the start of each epoch, which would shift the dropout of all that follows.)
    """

    def __init__(self, rows: Sequence[Any], batches: EpochBatches, collate: Callable[[Any], Any], *, pin: bool) -> None:
        super().__init__(
            rows,  # type: ignore[arg-type]  # a sequence is all that a map-style data set needs
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=0,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch)
