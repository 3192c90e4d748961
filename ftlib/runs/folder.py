"""The record of a run in its folder, as a batch host reads and writes it. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlib.runs import events, ledger
from ftlib.runs.events import Event
from ftlib.runs.ledger import Ledger


class RunFolder:
    """A run's ledger, and the place of its events."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.name: str = path.name
        self._latest: float | None = None  # time of the latest event that this process knows of

    def ledger(self) -> Ledger:
        """All that is recorded now."""
        current = ledger.read(self.path)
        self._latest = max((event.time for event in current.events), default=0.0)
        return current

    def record(self, *recorded: Event, writer: str | None = None) -> None:
        """Add events of one moment to the writer's own file (by default this process's on the login node)."""
        if self._latest is None:
            self.ledger()
        not_before = self._latest or 0.0
        events.append(self.path / "events", writer or events.submit_writer(), *recorded, not_before=not_before)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where it does not exist."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return value if isinstance(value, dict) else {}
