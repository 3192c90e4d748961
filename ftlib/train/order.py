"""In which order rows are read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Order(Sampler[int]):
    """Row indices of a whole training: shuffled epochs one after the other, `length` in all.

    The order depends on the seed alone. Optimizer step s trains rows [s * global_batch, (s + 1) * global_batch)
    of it, whatever the micro-batch, the accumulation and the world size; no step is cut short at an epoch's end.
    """

    def __init__(self, rows: int, length: int, seed: int) -> None:
        self._rows, self._length, self._seed = rows, length, seed

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        left, epoch = self._length, 0
        while left > 0:
            # Two numbers into one seed, so that seed 0's second epoch is not seed 1's first.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            yield from torch.randperm(self._rows, generator=generator)[:left].tolist()
            left, epoch = left - self._rows, epoch + 1
