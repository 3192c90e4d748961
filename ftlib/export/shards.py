"""Full weights in safetensors shards, written one after another into a folder where finished ones stay.

A shard is whole once it has its final name and its checksum is recorded: a later attempt verifies it and writes the
others. Beside the interpreter, one shard and what `take` needs for one tensor are in memory."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ftlib import atomic, sealing
from ftlib.stop import StopFlag

SHARD_BYTES = 5_000_000_000
RECORDS = "shards.json"
FORMAT = 1

Take = Callable[[str], torch.Tensor]
# Compares a written file with what its tensors, by name, must be; returns what is recorded beside its checksum.
Verify = Callable[[Path, list[str]], dict[str, Any]]


def write(
    folder: Path, records: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, take: Take, *,
    stop: StopFlag, committed: Callable[[str], None], verify: Verify | None = None,
) -> list[dict[str, Any]]:
    """Write the tensors of these names and shapes to `folder`, with an index where they take several files.
    `records`: a file beside the folder with the checksums of finished shards. `committed` gets each new one's name.
    Returns what `verify` found, a shard each. Raises Interrupted between two tensors, InputError without room."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES)
    files = split.filename_to_tensors
    folder.mkdir(exist_ok=True)
    finished = _finished(folder, records)
    sizes = {file: sum(empty[name].nbytes for name in names) for file, names in files.items()}
    missing = [file for file in files if file not in finished]
    atomic.require_space(folder, sum(sizes[file] for file in missing) + (16 << 20), "the merged weights")
    if finished:
        print(f"merged weights: {len(finished)} of {len(files)} shards are there and verified", flush=True)
    began, done = time.monotonic(), 0
    for number, file in enumerate(missing, start=1):
        tensors = {}
        for name in files[file]:
            stop.check()
            tensors[name] = take(name).contiguous()
        temporary = atomic.temporary_beside(folder / file)
        save_file(tensors, temporary, metadata={"format": "pt"})
        del tensors
        stop.check()
        found = verify(temporary, files[file]) if verify else {}
        algorithm = sealing.fastest()
        atomic.fsync(temporary)
        checksum = sealing.digest(temporary, algorithm)
        os.replace(temporary, folder / file)
        atomic.fsync(folder)
        finished[file] = {
            "bytes": (folder / file).stat().st_size, "hash": algorithm, "digest": checksum, "found": found}
        atomic.write_json(records, {"format": FORMAT, "files": finished})
        committed(file)
        done += sizes[file]
        seconds = time.monotonic() - began
        left = sum(sizes[later] for later in missing[number:]) * seconds / max(done, 1)
        print(f"merged weights: shard {len(finished)} of {len(files)}, {done / 1e9 / max(seconds, 1e-3):.2f} GB/s, "
              f"about {left:.0f} s left", flush=True)  # fmt: skip
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        atomic.write_json(folder / "model.safetensors.index.json", index)
    return [finished[file]["found"] for file in files]


def _finished(folder: Path, records: Path) -> dict[str, dict[str, Any]]:
    """The recorded shards that are there and verify. What else is in the folder is removed, or it would be exported."""
    try:
        listed = sealing.manifest(records, FORMAT)["files"]
    except (OSError, ValueError):
        listed = {}
    problems = sealing.damage(folder, listed, RECORDS)
    damaged = {line.split(" ", 1)[0] for line in problems}
    for name in sorted(damaged & set(listed)):
        print(f"merged weights: {name} of an earlier attempt is damaged or missing and is written again", flush=True)
    whole = {name: record for name, record in listed.items() if name not in damaged}
    for path in folder.iterdir():
        if path.is_file() and path.name not in whole:
            path.unlink()
    return whole

