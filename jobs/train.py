"""The train stage's task: what a Slurm task or the local executor runs."""

from __future__ import annotations

import importlib
import os

from ftlib.rundir import RunDir
from ftlib.stop import StopFlag


def main(run: RunDir, life: int, stop: StopFlag) -> str:
    """Run one life of the stage; returns one line of words for its outcome."""
    from ftlib.train.interruptible import interruptible

    if os.environ.get("WORLD_SIZE", "1") == "1":  # one rank alone must not leave
        interruptible(stop, lambda: importlib.import_module("ftlib.train.run"))
    from ftlib.train.run import train

    return train(run, life, stop)
