"""Events of the first release (format 1), as today's classes. That format is read for good and never written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlib import atomic
from ftlib.runs import events
from ftlib.runs.events import Event, Override
from ftlib.runs.overrides import EXCLUDE, MICRO_BATCH

# Fields that have another name now.
RENAMED = {"life": "attempt", "words": "message", "after_life": "after_attempt"}
# A first release called the recovery job so.
STAGES = {"guard": "recovery"}
CHOICES: dict[str, events.Choice] = {"requeued": "requeue", "interrupted": "leave", "failed": "stop"}


def event(row: Mapping[str, Any], time: float, writer: str) -> Event | None:
    """The event of a row of format 1; None where it says nothing that is still used."""
    fields = {RENAMED.get(name, name): value for name, value in row.items()}
    fields["stage"] = STAGES.get(str(fields.get("stage")), fields.get("stage"))
    # A sweep's own submission has no job, of which there are many; a job's number may have been stored as one.
    fields["job_id"] = str(fields.get("job_id", ""))
    kind = str(row["event"])
    if kind in ("requeued", "interrupted", "failed", "completed"):
        return _end(kind, fields, time, writer)
    if kind == "first_step":
        fields["parts_s"] = {name: value for name, value in fields.items() if name.endswith("_s")}
    if kind == "resumed":  # checkpoint -> why it was not used
        fields["rejected"] = [f"{name}: {'; '.join(why)}" for name, why in (fields.get("rejected") or {}).items()]
    return events.from_row({**fields, "event": kind}, time=time, writer=writer)


def _end(kind: str, fields: Mapping[str, Any], time: float, writer: str) -> Event:
    """An end: reported by the attempt itself, settled and decided by an epilogue (one row for both, of which the
    decision is derived again), settled by a later process, or a stop that followed no attempt."""
    stage, attempt = str(fields["stage"]), int(fields.get("attempt") or 0)
    if writer == f"{stage}-{attempt}":
        return events.Ended(
            stage=stage, attempt=attempt, code=int(fields["code"]), message=str(fields.get("message", "")),
            seconds=float(fields.get("seconds") or 0.0), signal_s=fields.get("signal_s"), time=time, writer=writer,
        )  # fmt: skip
    if "cause" in fields:
        by: events.Settler = "recovery job"
        if writer.endswith("-epilogue"):
            by = "epilogue"
        elif writer.endswith("-prologue"):
            by = "prologue"
        return events.Settled(
            stage=stage, attempt=attempt, job_id=str(fields.get("job_id", "")), cause=str(fields["cause"]), by=by,
            message=str(fields.get("message", "")), line=str(fields.get("line", "")), code=fields.get("code"),
            node=str(fields.get("node", "")), ended=fields.get("ended"), time=time, writer=writer,
        )  # fmt: skip
    return events.Decided(
        stage=stage, choice=CHOICES[kind], job_id=str(fields.get("job_id", "")), attempt=attempt,
        message=str(fields.get("message", "")), time=time, writer=writer,
    )  # fmt: skip


# -- adjustments.json: overrides, in a file of their own ---------------------------------------------------------------

ADJUSTMENTS = "adjustments.json"
# For how long the first release left a bad node out.
EXCLUSION_S = 24 * 3600


_NOTE = re.compile(r"micro-batch \d+ -> (\d+): (.*)|node (\S+) is left out for \d+ h: (.*)", re.DOTALL)


def adjustments(run: Path | str, recorded: Sequence[Event]) -> list[Override]:
    """What the first release had adjusted in the run, as overrides from before anything that was `recorded`: nothing
    else is known of when, and every event of today's comes after it."""
    adjusted = _adjustments(run)
    start = recorded[0].time if recorded else 0.0
    overrides = [_override(str(note), adjusted, start) for note in adjusted.get("notes", ())]
    changes = [override for override in overrides if override]
    rows = next((change.value for change in reversed(changes) if change.field == MICRO_BATCH), None)
    if rows != adjusted.get("micro_batch"):  # it was planned anew for another number of nodes
        changes.append(Override(field=MICRO_BATCH, value=adjusted.get("micro_batch"), who="", why="", time=start))
    return changes


def _override(note: str, adjusted: Mapping[str, Any], start: float) -> Override | None:
    """What one line of the notes tells."""
    match = _NOTE.fullmatch(note)
    if match is None:
        return None
    rows, why_rows, node, why_node = match.groups()
    if rows:
        return Override(field=MICRO_BATCH, value=int(rows), who="epilogue", why=why_rows, time=start)
    until = float(adjusted["exclude"][node])
    return Override(field=EXCLUDE + node, value=True, who="epilogue", why=why_node, until=until,
                    time=until - EXCLUSION_S)  # fmt: skip


def forget_micro_batch(run: Path) -> None:
    """A run of the first release goes on with that release's own code, which reads the file: drop its micro-batch."""
    adjusted = _adjustments(run)
    if adjusted:
        kept = {name: value for name, value in adjusted.items() if name not in ("micro_batch", "accumulation")}
        atomic.write_json(run / ADJUSTMENTS, kept)


def _adjustments(run: Path | str) -> dict[str, Any]:
    path = f"{run}/{ADJUSTMENTS}"
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
