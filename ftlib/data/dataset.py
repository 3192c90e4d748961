"""Packed rows as torch tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ftlib.data import packing

IGNORED = -100


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of a folder that `packing.write` made, memory-mapped.

    An item is {"input_ids", "labels", "position_ids"}, each int64 of shape (seq_len,); labels are -100 outside
    responses. There is no attention_mask: transformers then keeps packed documents apart by their position ids.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.meta, self._arrays = packing.read(self.folder)

    def __len__(self) -> int:
        return int(self.meta["rows"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, response, positions = (
            torch.from_numpy(self._arrays[name][index].astype("int64")) for name in packing.FILES
        )
        return {
            "input_ids": tokens,
            "labels": tokens.masked_fill(response == 0, IGNORED),
            "position_ids": positions,
        }

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker opens the files itself instead of receiving their content.
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch of packed rows that are no padding: a row's last document without a target is padding."""
    positions, labels = batch["position_ids"], batch["labels"]
    columns = torch.arange(positions.shape[1], device=positions.device)
    last_start = ((positions == 0) * columns).amax(dim=1, keepdim=True)
    in_last = columns >= last_start
    has_target = ((labels != IGNORED) & in_last).any(dim=1)
    return positions.numel() - int(in_last.sum(dim=1)[~has_target].sum())
