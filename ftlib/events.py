"""What happened to a run: append-only JSON lines, one file per writer, merged by time when read."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Name = Literal[
    "intended",
    "submitted", "started", "resumed", "first_step", "checkpoint",
    "interrupted", "requeued", "completed", "failed", "cancelled",
]


def submit_writer() -> str:
    """Name of this process as a writer on the login node."""
    return f"submit-{socket.gethostname()}-{os.getpid()}"


def append(folder: Path, writer: str, event: Name, **fields: Any) -> None:
    """Add one event to the writer's own file and flush it to storage."""
    append_all(folder, writer, [(event, fields)])


def append_all(folder: Path, writer: str, events: Sequence[tuple[Name, dict[str, Any]]]) -> None:
    """`append` for several events of one moment."""
    folder.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
    lines = [json.dumps({"time": now, "event": name, **fields}, ensure_ascii=False) for name, fields in events]
    with (folder / f"{writer}.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """All events, oldest first. A line cut short by a crash is left out."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "time" in event and "event" in event:
                found.append({"writer": path.stem, **event})
    return sorted(found, key=lambda event: str(event["time"]))
