"""What the decisions need of a run folder: its ledger, a place to record events, and the claim of its one writer.
`RunDir` is one on a file system; the simulation has one in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from ftlib.runs.events import Event
from ftlib.runs.ledger import Ledger


class Record(Protocol):
    """The record of one run, as a batch host uses it."""

    name: str

    def ledger(self) -> Ledger:
        """All that is recorded now."""

    def record(self, *events: Event, writer: str | None = None) -> None:
        """Add events of one moment to the writer's own file (this process's, without one)."""


class RunStore(Record, Protocol):
    """The record of one run, as a login node uses it."""

    def claim(self, *, wait_s: float = 0.0, silent_s: float | None = None) -> AbstractContextManager[None]:
        """Be the only process that queues jobs of this run. Raises `InputError` where another one does.

        wait_s: how long to wait for another. silent_s: take over a claim that was not touched for so long.
        """
