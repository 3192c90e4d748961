"""Events of the first release (format 1), as today's classes. That format is read for good and never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlib.runs import events
from ftlib.runs.events import Event

# Fields that have another name now.
RENAMED = {"life": "attempt", "words": "message", "after_life": "after_attempt"}
# A first release called the recovery job so.
STAGES = {"guard": "recovery"}
CHOICES: dict[str, events.Choice] = {"requeued": "requeue", "interrupted": "leave", "failed": "stop"}


def event(row: Mapping[str, Any], time: float, writer: str) -> Event | None:
    """The event of a row of format 1; None where it says nothing that is still used."""
    fields = {RENAMED.get(name, name): value for name, value in row.items()}
    fields["stage"] = STAGES.get(str(fields.get("stage")), fields.get("stage"))
    kind = str(row["event"])
    if kind in ("requeued", "interrupted", "failed", "completed"):
        return _end(kind, fields, time, writer)
    if kind == "first_step":
        fields["parts_s"] = {name: value for name, value in fields.items() if name.endswith("_s")}
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
