"""Saving a training so that a later life goes on from the very step, and choosing what to go on from."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ftlib import atomic, checkpoint
from ftlib.metrics import read_metrics
from ftlib.rundir import RunDir

STATE = "training.json"


@dataclass(frozen=True)
class TrainingState:
    """What our side keeps in a checkpoint, beside the Trainer's own files."""

    step: int
    total: int
    evaluation_due: bool
    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int

    def write(self, folder: Path) -> None:
        """Put it into a checkpoint that is being made."""
        (folder / STATE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> TrainingState:
        """That of a committed checkpoint."""
        return TrainingState(**json.loads((folder / STATE).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Found:
    """Where a life begins: a verified checkpoint, or none (`folder` is None)."""

    folder: Path | None
    state: TrainingState | None
    rejected: dict[str, list[str]]
    evaluation_due: bool = False  # The validation of that step is still to be done.

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.state.step if self.state else 0


def find(run: RunDir) -> Found:
    """The newest checkpoint of the run that verifies; each newer one that does not is named, with the reason."""
    folder, rejected = checkpoint.newest(run.checkpoints, run=run.name)
    for name, reasons in rejected.items():
        print(f"checkpoint {name} is damaged and not used: {'; '.join(reasons[:3])}", flush=True)
    if folder is None:
        return Found(None, None, rejected)
    state = TrainingState.read(folder)
    # The save came before the validation, which the same life may have done after it.
    done = {row["step"] for row in read_metrics(run.metrics_file) if "eval_loss" in row}
    return Found(folder, state, rejected, state.evaluation_due and state.step not in done)


def temporary(run: RunDir, step: int, life: int) -> Path:
    """Where a life builds the checkpoint of `step`: every rank derives the same name."""
    return run.checkpoints / f"{atomic.TEMPORARY}step-{step:08d}-life-{life}"


def begin(folder: Path, need_bytes: int) -> None:
    """Make the empty temporary folder, if the checkpoint fits. Rank 0 only."""
    atomic.require_space(folder.parent, need_bytes, "a checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def bytes_of(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
