"""What is DeepSpeed's own in a training: its engine's checkpoints, and going on from one with other processes."""

import os
import shutil
import subprocess
import sys
import time
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
    _name_the_stage(engine)
    engine.save_checkpoint(str(folder), tag=f"{TAG}{step}")
    for script in folder.glob("zero_to_*.py"):
        script.unlink()


def _name_the_stage(engine: Any) -> None:
    """Let the optimizer's state say its ZeRO stage, for those who join or rewrite the shards.
    With stage 1 in bf16 and gradients accumulated in fp32, DeepSpeed takes its BF16_Optimizer. Its shards are laid out
    as those of the others are, but lack this one entry, without which they are "not a zero checkpoint"."""
    from deepspeed.checkpoint.constants import ZERO_STAGE
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer) or "state_dict" in vars(optimizer):
        return
    state_dict = optimizer.state_dict
    optimizer.state_dict = lambda: {**state_dict(), ZERO_STAGE: engine.zero_optimization_stage()}


def shards(checkpoint: Path) -> Path:
    """The engine's folder in a checkpoint; FtError in one that was saved without ZeRO."""
    if found := next(checkpoint.glob(f"{TAG}*/"), None):
        return found
    raise FtError(f"{checkpoint} holds no ZeRO shards, but the recipe has a zero.stage")


def converted(run: RunDir, found: saving.Found, stop: StopFlag) -> Path:
    """The checkpoint for any number of processes (DeepSpeed's universal format), in a temporary folder. Collective.
    Rank 0 makes it, in twice the shards' bytes; the others wait as long as it takes. Raises InputError for want of
    room, FtError when it cannot be done, Interrupted."""
    folder, before, now = found.folder, found.world_size, ranks.world_size()
    assert folder
    source, target = shards(folder), run.checkpoints / f"{atomic.TEMPORARY}universal-{folder.name}"

    def convert() -> None:
        size, made = saving.bytes_of(source), target / source.name
        words = f"the checkpoint is of {before} GPUs (processes) and is rewritten for {now}: {size / 2**30:,.2f} GiB"
        print(words, flush=True)
        atomic.require_space(run.checkpoints, 2 * size, "a checkpoint for another number of GPUs")
        target.mkdir()
        made.mkdir()
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(source), "--output_folder", str(made)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        # In a process of its own, which has no rank.
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with (target / "log").open("w+") as said:
            child = subprocess.Popen(command, env=own, stdout=said, stderr=said)
            while child.poll() is None and not stop.cause:
                time.sleep(0.1)
            child.kill()
            if stop.cause:
                raise Interrupted(stop.cause, found.step)
            if child.wait():
                said.seek(0)
                raise FtError(
                    f"the checkpoint of step {found.step} cannot be rewritten for {now} processes: "
                    f"{said.read().strip().splitlines()[-1:]}. With {before} processes it can be gone on from")
        for name in TRAINERS:
            shutil.copyfile(folder / name, target / name)
        (target / "latest_universal").write_text(source.name, encoding="utf-8")

    ranks.first_alone(convert)
    return target


def mend(optimizer: Any, decays: list[float]) -> None:
    """Undo what loading a universal checkpoint does to torch's AdamW; `decays`: weight decay of each group.
    All states share one `step` tensor, which each counts up, and all groups get the first one's hyperparameters."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    for state in inner.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    for group, decay in zip(inner.param_groups, decays, strict=True):
        group["weight_decay"] = decay
