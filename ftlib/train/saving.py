"""Saving a training so that a later life goes on from the very step, and choosing what to go on from."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from ftlib import atomic, checkpoint
from ftlib.errors import FtError, InputError
from ftlib.metrics import read_metrics
from ftlib.rundir import RunDir
from ftlib.train import ranks

STATE = "training.json"
FULL = (errno.ENOSPC, errno.EDQUOT)


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
    best: tuple[float, int] | None = None  # The lowest validation loss so far, and its step.
    worse: int = 0  # Validations since then.
    early: bool = False  # So many that the training ended there.

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.state.step if self.state else 0

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.early or (self.state is not None and self.state.step >= self.state.total)


def find(run: RunDir) -> Found:
    """The newest checkpoint of the run that verifies; each newer one that does not is named, with the reason."""
    folder, rejected = checkpoint.newest(run.checkpoints, run=run.name)
    for name, reasons in rejected.items():
        print(f"checkpoint {name} is damaged and not used: {'; '.join(reasons[:3])}", flush=True)
    if folder is None:
        return Found(None, None, rejected)
    state = TrainingState.read(folder)
    validated = [(row["eval_loss"], row["step"]) for row in read_metrics(run.metrics_file) if "eval_loss" in row]
    validated = [(loss, step) for loss, step in validated if step <= state.step]
    # The save came before the validation, which the same life may have done after it.
    due = state.evaluation_due and state.step not in {step for _, step in validated}
    best = min(validated, default=None)
    worse = sum(step > best[1] for _, step in validated) if best else 0
    enough = run.spec().train.stop_after_worse
    return Found(folder, state, rejected, due, best, worse, enough is not None and worse >= enough)


def temporary(run: RunDir, step: int, life: int) -> Path:
    """Where a life builds the checkpoint of `step`: every rank derives the same name."""
    return run.checkpoints / f"{atomic.TEMPORARY}step-{step:08d}-life-{life}"


def begin(folder: Path, need_bytes: int) -> None:
    """Make the empty temporary folder, if the checkpoint fits. Rank 0 only."""
    atomic.require_space(folder.parent, need_bytes, "a checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def part_of(folder: Path) -> Path:
    """Where this rank writes its share of the checkpoint in `folder`, so that each rank hashes what it wrote."""
    if ranks.world_size() == 1:
        return folder
    part = folder / f"{atomic.TEMPORARY}rank-{ranks.rank()}"
    part.mkdir()
    return part


def join(part: Path, folder: Path) -> None:
    """Move a rank's share into the checkpoint's folder."""
    if part == folder:
        return
    for path in sorted(part.rglob("*")):
        target = folder / path.relative_to(part)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.rename(path, target)
    shutil.rmtree(part)


@contextlib.contextmanager
def full_disk_in_words(folder: Path, need_bytes: int, run: str) -> Iterator[None]:
    """A failed write for want of room becomes an FtError that says so; earlier checkpoints are whole in any case.

    Libraries report it each in their own way, and a quota is not seen in the free space: we ask for the room ourselves.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:
        full = isinstance(error, InputError) or getattr(error, "errno", None) in FULL
        full = full or _room_lacks(folder.parent, need_bytes)
        shutil.rmtree(folder, ignore_errors=True)
        if not full:
            raise
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise FtError(
            f"No space left on device (disk or quota) for a checkpoint of about {need_bytes / 2**20:,.1f} MiB in "
            f"{folder.parent}, with {free:,.1f} MiB free. Earlier ones are whole; free some, then "
            f"'make resume RUN={run}'"
        ) from error


def _room_lacks(folder: Path, need_bytes: int) -> bool:
    probe = folder / f"{atomic.TEMPORARY}probe"
    try:
        handle = os.open(probe, os.O_CREAT | os.O_WRONLY)
        try:
            os.posix_fallocate(handle, 0, need_bytes)
        finally:
            os.close(handle)
    except OSError as error:
        return error.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False


def bytes_of(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
