"""What happened to a run: append-only JSON lines, one file per writer, merged by time when read."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ftlib.outcome import names

Name = Literal[
    "intended", "submitted", "started", "resumed", "first_step", "checkpoint", "progress",
    "interrupted", "requeued", "completed", "failed", "cancelled", "moved"]


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


def progressed(run: Path, stage: str, life: int, piece: str) -> None:
    """A piece of the stage's work (a file, a batch of answers, some GB of a download) is committed, and no later
    attempt does it again: by that an interruption after it has cost nothing, and counts against no budget."""
    append(run / "events", f"{stage}-{life}", "progress", stage=stage, life=life, piece=piece)


def read(folder: Path) -> list[dict[str, Any]]:
    """All events, oldest first. A line cut short by a crash is left out.
    A writer's own lines keep their order, even where its clock was set back between them."""
    found = []
    for name in names(folder):
        if not name.endswith(".jsonl"):
            continue
        with open(f"{folder}/{name}", encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
        writer, latest = name[:-6], ""
        for event in _parsed(lines):
            if isinstance(event, dict) and "time" in event and "event" in event:
                latest = max(latest, str(event["time"]))
                found.append((latest, {"writer": writer, **event}))
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]


def _parsed(lines: list[str]) -> Iterator[Any]:
    try:  # All at once is twice as fast, and thousands of runs are read for one look at them.
        yield from json.loads(f"[{','.join(filter(None, lines))}]")
    except ValueError:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)
