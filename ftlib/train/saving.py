"""Committing a life's checkpoints, deleting those of no more use, and choosing what a life goes on from."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ftlib import atomic, checkpoint, sealing
from ftlib.errors import FtError, InputError
from ftlib.metrics import MetricsWriter, read_metrics
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved
from ftlib.train import ranks
from ftlib.train.interval import Cadence

STATE = "training.json"  # what our side keeps in a checkpoint, beside the Trainer's own files
FULL = (errno.ENOSPC, errno.EDQUOT)

Write = Callable[[Path, sealing.Sealer], None]


@dataclass(frozen=True)
class Found:
    """Where a life begins: a verified checkpoint, or none (`folder` is None)."""

    folder: Path | None
    rejected: dict[str, list[str]]
    step: int = 0  # Optimizer steps already done,
    total: int = 1  # of so many,
    world_size: int | None = None  # by so many processes.
    evaluation_due: bool = False  # The validation of that step is still to be done.
    best: tuple[float, int] | None = None  # The lowest validation loss so far, and its step.
    worse: int = 0  # Validations since then.
    early: bool = False  # So many that the training ended there.

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.early or self.step >= self.total

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold, for the other ranks."""
        return {**asdict(self), "folder": str(self.folder) if self.folder else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Found":
        """What `to_json` gave."""
        folder, best = values["folder"], values["best"]
        own = {"folder": Path(folder) if folder else None, "best": (float(best[0]), int(best[1])) if best else None}
        return cls(**{**values, **own})


def find(run: RunDir) -> Found:
    """The newest checkpoint of the run that verifies; each newer one that does not is named, with the reason."""
    folder, rejected = checkpoint.newest(run.checkpoints, run=run.name)
    for name, reasons in rejected.items():
        print(f"checkpoint {name} is damaged and not used: {'; '.join(reasons[:3])}", flush=True)
    if folder is None:
        return Found(None, rejected)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    step = state["step"]
    rows = [row for row in read_metrics(run.metrics_file) if "eval_loss" in row and row["step"] <= step]
    best = min(((row["eval_loss"], row["step"]) for row in rows), default=None)
    worse = sum(row["step"] > best[1] for row in rows) if best else 0
    enough = run.spec().train.stop_after_worse
    # The save came before the validation, which the same life may have done after it.
    due = state["evaluation_due"] and all(row["step"] != step for row in rows)
    early = enough is not None and worse >= enough
    return Found(folder, rejected, step, state["total"], state["world_size"], due, best, worse, early)


class Keeping:
    """The checkpoints of one life, on every rank alike. `step`: the newest that it committed or began from."""

    def __init__(
        self, run: RunDir, life: int, *, every: int | None, metrics: MetricsWriter | None, cadence: Cadence
    ) -> None:
        """every: steps whose checkpoints are kept for good. metrics: rank 0's."""
        self.run, self.life, self.every, self.metrics, self.cadence = run, life, every, metrics, cadence
        self.step: int | None = None
        self._verified: set[int] = set()
        self._size: int | None = None
        self._deleting = ThreadPoolExecutor(1)

    def begun_from(self, step: int) -> None:
        """The checkpoint of `step` was verified and is whole."""
        self.step = step
        self._verified.add(step)

    def save(self, step: int, write: Write, need_bytes: int, *, best: int | None) -> None:
        """Commit a checkpoint of `step`, unless that is done; `write` puts this rank's share into a folder. Collective.
        need_bytes: what it may take, over all ranks, as long as none has been saved."""
        if self.step == step:
            return
        began, first = time.perf_counter(), ranks.rank() == 0
        # Every rank derives the same name.
        folder = self.run.checkpoints / f"{atomic.TEMPORARY}step-{step:08d}-life-{self.life}"
        need = self._size + (1 << 16) if self._size else need_bytes
        with _full_disk_in_words(folder, need, self.run.name):
            if first:
                atomic.require_space(folder.parent, need, "a checkpoint")
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(exist_ok=True)  # not its parents: a run folder that is gone must stay so
                folder.mkdir()
            ranks.barrier()
            # In a folder of its own, each rank hashes what it wrote.
            part = folder / f"{atomic.TEMPORARY}rank-{ranks.rank()}" if ranks.world_size() > 1 else folder
            part.mkdir(exist_ok=True)
            with sealing.Sealer(part) as sealer:
                write(part, sealer)
                mine = sealer.finish()
            if part != folder:
                shutil.copytree(part, folder, copy_function=os.rename, dirs_exist_ok=True)
                shutil.rmtree(part)
            sealed = {name: file for files in ranks.gathered(mine) for name, file in files.items()}
            if first:
                if self.metrics:
                    self.metrics.sync()
                checkpoint.commit(folder, self.run.checkpoints, run=self.run.name, step=step, sealed=sealed)
        self.begun_from(step)
        if first:
            self._size = sum(file["bytes"] for file in sealed.values())
            seconds = time.perf_counter() - began
            self.prune(best)
            self.cadence.saved(seconds)
            if words := self.cadence.words():
                print(words, flush=True)
            saved = CheckpointSaved(
                stage="train", attempt=self.life, step=step, seconds=round(seconds, 3), bytes=self._size)
            self.run.record(saved, writer=f"train-{self.life}")
        ranks.barrier()

    def prune(self, best: int | None) -> None:
        """Delete what is neither new, nor `best`, nor to be kept."""
        if ranks.rank() == 0:
            checkpoint.prune(
                self.run.checkpoints, run=self.run.name, best=best, every=self.every, verified=self._verified,
                # Gigabytes take a while to delete; a process that ends meanwhile leaves them to the next life.
                delete=lambda folder: self._deleting.submit(shutil.rmtree, folder, ignore_errors=True))

    def close(self) -> None:
        """Wait for what is being deleted."""
        self._deleting.shutdown()


@contextlib.contextmanager
def _full_disk_in_words(folder: Path, need_bytes: int, run: str) -> Iterator[None]:
    """A failed write for want of room becomes an FtError that says so; earlier checkpoints are whole in any case.
    Each library reports it in its own way, and no free space shows a quota: we ask for the room ourselves."""
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
            f"'make resume RUN={run}'") from error


def _room_lacks(folder: Path, need_bytes: int) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, need_bytes)
    except OSError as error:
        return error.errno in FULL
    return False


def bytes_of(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
