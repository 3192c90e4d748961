"""Committing a life's checkpoints and deleting those of no more use. Every rank has one, and calls it together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ftlib import checkpoint, events, sealing
from ftlib.metrics import MetricsWriter
from ftlib.rundir import RunDir
from ftlib.train import ranks, saving
from ftlib.train.interval import Cadence

Write = Callable[[Path, sealing.Sealer], None]


class Keeping:
    """The checkpoints of one life. `step` is the newest that this life committed or began from."""

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

        need_bytes: what it may take, over all ranks, as long as none has been saved.
        """
        if self.step == step:
            return
        began, first = time.perf_counter(), ranks.rank() == 0
        folder = saving.temporary(self.run, step, self.life)
        need = self._size + (1 << 16) if self._size else need_bytes
        with saving.full_disk_in_words(folder, need, self.run.name):
            if first:
                saving.begin(folder, need)
            ranks.barrier()
            part = saving.part_of(folder)
            with sealing.Sealer(part) as sealer:
                write(part, sealer)
                mine = sealer.finish()
            saving.join(part, folder)
            sealed = {name: file for files in ranks.gathered(mine) for name, file in files.items()}
            if first:
                if self.metrics:
                    self.metrics.sync()
                checkpoint.commit(folder, self.run.checkpoints, run=self.run.name, step=step, sealed=sealed)
        self.begun_from(step)
        if first:
            self._size = sum(file["bytes"] for file in sealed.values())
            self._saved(step, time.perf_counter() - began, best)
        ranks.barrier()

    def _saved(self, step: int, seconds: float, best: int | None) -> None:
        self.prune(best)
        self.cadence.saved(seconds)
        if words := self.cadence.words():
            print(words, flush=True)
        events.append(
            self.run.events, f"train-{self.life}", "checkpoint", stage="train", life=self.life, step=step,
            seconds=round(seconds, 3), bytes=self._size,
        )  # fmt: skip

    def prune(self, best: int | None) -> None:
        """Delete what is neither new, nor `best`, nor to be kept."""
        if ranks.rank() == 0:
            checkpoint.prune(
                self.run.checkpoints, run=self.run.name, best=best, every=self.every, verified=self._verified,
                delete=self._delete_later,
            )  # fmt: skip

    def _delete_later(self, folder: Path) -> None:
        """A folder of gigabytes takes a while to delete; a process that ends meanwhile leaves it to the next life."""
        self._deleting.submit(shutil.rmtree, folder, ignore_errors=True)

    def close(self) -> None:
        """Wait for what is being deleted."""
        self._deleting.shutdown()
