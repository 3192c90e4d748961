"""Packed rows as torch tensors, and the order they are read in."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from ftlib.data import packing

IGNORED = -100


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of a folder that `packing.write` made, memory-mapped: {"input_ids", "labels", "position_ids"}.
    Each is int64 of shape (seq_len,); labels are -100 outside responses. transformers keeps packed documents apart by
    their position ids; where each row is one document, it has an attention_mask instead."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.meta, self._arrays = packing.read(self.folder)

    def __len__(self) -> int:
        return int(self.meta["rows"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, response, positions = (
            torch.from_numpy(self._arrays[name][index].astype("int64")) for name in packing.FILES)
        item = {"input_ids": tokens, "labels": tokens.masked_fill(response == 0, IGNORED)}
        if self.meta.get("packed", True):
            return item | {"position_ids": positions}
        # Positions start anew where the padding does.
        return item | {"attention_mask": ((positions == 0).cumsum(0) == 1).long()}


class Order(Sampler[int]):
    """Row indices of a whole training: epochs one after the other, shuffled by the seed alone, `length` in all.
    Step s trains rows [s * global_batch, (s + 1) * global_batch) of it at any micro-batch, accumulation and world
    size."""

    def __init__(self, rows: int, length: int, seed: int) -> None:
        self._rows, self._length, self._seed = rows, length, seed

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        for epoch, start in enumerate(range(0, self._length, self._rows)):
            # Two numbers into one seed, so that seed 0's second epoch is not seed 1's first.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            yield from torch.randperm(self._rows, generator=generator)[: self._length - start].tolist()


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch; of padded rows no more columns than the longest document has."""
    batch: dict[str, torch.Tensor] = default_collate(items)
    if "attention_mask" in batch:
        width = int(batch["attention_mask"].sum(dim=1).max())
        batch = {name: values[:, :width] for name, values in batch.items()}
    return batch


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch of packed rows that are no padding: a row's last document without a target is padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    positions, labels = batch["position_ids"], batch["labels"]
    columns = torch.arange(positions.shape[1], device=positions.device)
    last_start = ((positions == 0) * columns).amax(dim=1, keepdim=True)
    in_last = columns >= last_start
    has_target = ((labels != IGNORED) & in_last).any(dim=1)
    return positions.numel() - int(in_last.sum(dim=1)[~has_target].sum())
