"""The export stage's task: what a Slurm task or the local executor runs."""

from __future__ import annotations

import importlib

from ftlib.rundir import RunDir
from ftlib.stop import StopFlag


def main(run: RunDir, life: int, stop: StopFlag) -> str:
    """Run one life of the stage; returns one line of words for its outcome."""
    from ftlib.train.interruptible import interruptible

    interruptible(stop, lambda: importlib.import_module("ftlib.export.run"))
    from ftlib.export.run import export

    return export(run, life, stop)
