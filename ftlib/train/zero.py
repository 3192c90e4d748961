"""What is DeepSpeed's own in a training: its engine's checkpoints, and going on from one with other processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ftlib import atomic
from ftlib.errors import FtError, Interrupted
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.train import ranks, saving

# What the Trainer itself reads of a checkpoint, beside the engine's files.
TRAINERS = ("trainer_state.json", "scheduler.pt")
# A name that begins so is what the Trainer takes for the engine's folder.
TAG = "global_step"


def prepare(*, on_gpu: bool) -> None:
    """Tell DeepSpeed of the process group; before any model is loaded."""
    import deepspeed

    if not on_gpu:
        # Its collectives through shared memory are compiled when first used: a minute, and a lock that a kill leaves.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)


def save(engine: Any, folder: Path, step: int) -> None:
    """Put this rank's shard into its share of a checkpoint. Collective."""
    engine.save_checkpoint(str(folder), tag=f"{TAG}{step}")
    for script in folder.glob("zero_to_*.py"):
        script.unlink()


def shards(checkpoint: Path) -> Path | None:
    """The engine's folder in a checkpoint; None in one that was saved without ZeRO."""
    return next(checkpoint.glob(f"{TAG}*/"), None)


def converted(run: RunDir, found: saving.Found, stop: StopFlag) -> Path:
    """The checkpoint for any number of processes (DeepSpeed's universal format), in a temporary folder. Collective.

    Takes twice the shards' bytes on storage and the time to write them. Rank 0 does it, the others wait as long as it
    takes. Raises InputError for want of room, FtError when it cannot be done, Interrupted.
    """
    assert found.folder and found.state
    target = run.checkpoints / f"{atomic.TEMPORARY}universal-{found.folder.name}"

    def convert() -> None:
        assert found.folder and found.state
        shutil.rmtree(target, ignore_errors=True)
        source = shards(found.folder)
        assert source
        print(
            f"the checkpoint is of {found.state.world_size} GPUs (processes) and is rewritten for "
            f"{ranks.world_size()}: {saving.bytes_of(source) / 2**30:,.2f} GiB",
            flush=True,
        )
        atomic.require_space(run.checkpoints, 2 * saving.bytes_of(source), "a checkpoint for another number of GPUs")
        made = target / source.name
        made.mkdir(parents=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(source), "--output_folder", str(made)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        # In a process of its own: it has no rank, and forks.
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            while child.poll() is None:
                try:
                    child.wait(0.2)
                except subprocess.TimeoutExpired:
                    if stop.cause:
                        child.kill()
            said = child.stdout.read() if child.stdout else ""
        if stop.cause:
            raise Interrupted(stop.cause, found.step)
        if child.returncode:
            raise FtError(
                f"the checkpoint of step {found.step} cannot be rewritten for {ranks.world_size()} processes: "
                f"{said.strip().splitlines()[-1:]}. With {found.state.world_size} processes it can be gone on from"
            )
        for name in TRAINERS:
            shutil.copyfile(found.folder / name, target / name)
        (target / "latest_universal").write_text(source.name, encoding="utf-8")

    ranks.first_alone(convert)
    return target


def mend(optimizer: Any, decays: list[float]) -> None:
    """Undo what loading a universal checkpoint does to torch's AdamW; `decays`: weight decay of each group.

    All states share one `step` tensor, which each then counts up, and all groups get the first one's hyperparameters.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    for state in inner.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    for group, decay in zip(inner.param_groups, decays, strict=True):
        group["weight_decay"] = decay
