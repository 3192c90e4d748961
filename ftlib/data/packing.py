"""Packing documents into rows of equal length, and the files of packed rows. numpy, no torch.

A folder of packed rows holds, each of shape (rows, seq_len) in C order:
tokens.bin     uint16, or uint32 where the vocabulary needs it
response.bin   uint8, 1 where the token is a target of the loss
positions.bin  position ids, starting at 0 in each document and in the padding at a row's end
and meta.json with the shape, the types and the counts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ftlib import atomic
from ftlib.data.tokenizing import Documents

FILES = ("tokens", "response", "positions")


def best_fit_decreasing(lengths: npt.NDArray[Any], capacity: int, seed: int) -> list[list[int]]:
    """Document indices of each row: longest first, each into the fullest row that holds it.
    Equal lengths are taken in an order drawn by `seed`, and so are the rows. Every length must be in 1..capacity."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order].astype(np.int64), kind="stable")]
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while some row has room r: the lowest set bit from `length` up is the best fit.
    rooms = 0
    for document in order.tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(document)
        else:
            room, row = capacity, len(rows)
            rows.append([document])
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return [rows[row] for row in rng.permutation(len(rows))]


def write(
    folder: Path, documents: Documents, *, vocabulary: int, pad: int, seed: int, packed: bool = True
) -> dict[str, Any]:
    """Pack `documents` into a new `folder`, or give each a row of its own; returns its meta."""
    seq_len = documents.longest
    tokens, targets, lengths = map(np.asarray, (documents.tokens, documents.targets, documents.lengths))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    alone = np.random.default_rng(seed).permutation(len(lengths))
    rows = best_fit_decreasing(lengths, seq_len, seed) if packed else [[i] for i in alone.tolist()]
    types = {
        "tokens": "uint16" if vocabulary <= 2**16 else "uint32", "response": "uint8",
        "positions": "uint16" if seq_len <= 2**16 else "uint32",
    }
    row_bytes = seq_len * sum(np.dtype(kind).itemsize for kind in types.values())
    atomic.require_space(folder, len(rows) * row_bytes, "the packed dataset")
    folder.mkdir(parents=True)
    shape = (len(rows), seq_len)
    out = {name: np.memmap(folder / f"{name}.bin", dtype=kind, mode="w+", shape=shape) for name, kind in types.items()}
    out["tokens"][:] = pad
    counting = np.arange(seq_len)
    for number, row in enumerate(rows):
        at = 0
        for document in row:
            its = slice(starts[document], starts[document + 1])
            end = at + int(lengths[document])
            out["tokens"][number, at:end] = tokens[its]
            out["response"][number, at:end] = targets[its]
            # A document's first token has nothing before it to be predicted from.
            out["response"][number, at] = 0
            out["positions"][number, at:end] = counting[: end - at]
            at = end
        out["positions"][number, at:] = counting[: seq_len - at]
    meta = {
        "rows": len(rows), "seq_len": seq_len, "packed": packed, "dtype": types, "examples": len(lengths),
        "tokens": len(tokens), "response_tokens": int(out["response"].sum(dtype=np.int64)),
        "dropped_too_long": documents.dropped_too_long,
    }
    for array in out.values():
        array.flush()
    atomic.write_json(folder / "meta.json", meta)
    return meta


def read(folder: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """meta.json and the memory-mapped arrays. Raises ValueError when a file has not the size that meta.json says."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in FILES:
        path, dtype = folder / f"{name}.bin", np.dtype(meta["dtype"][name])
        needed = meta["rows"] * meta["seq_len"] * dtype.itemsize
        if path.stat().st_size != needed:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {needed}")
        arrays[name] = np.memmap(path, dtype=dtype, mode="r", shape=(meta["rows"], meta["seq_len"]))
    return meta, arrays
