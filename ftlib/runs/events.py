"""Typed events: everything that is recorded about a run, one class per kind of event.

On disk an event is one JSON line in `RUN/events/WRITER.jsonl`: `format`, `time` (ISO 8601, UTC), `event` (the class's
KIND) and the class's fields, those with their default value left out. Every writer has a file of its own, so that no
two processes ever append to the same one. Events that the first release wrote (format 1) are read by `earlier.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import operator
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

FORMAT = 2

E = TypeVar("E", bound="type[Event]")
KINDS: dict[str, type[Event]] = {}

# What the reducer can decide about an attempt that has ended, or a job that is gone (see decide.py).
Choice = Literal["requeue", "leave", "stop", "queue anew"]
# Who settled the end of an attempt: the epilogue of its own job, the next attempt's prologue, or another process.
Settler = Literal["epilogue", "prologue", "recovery job", "owner", "sweep"]


def _kind(name: str) -> Callable[[E], E]:
    """Register an event class under the name by which it is stored."""

    def register(event_class: E) -> E:
        event_class.KIND = name
        KINDS[name] = event_class
        return event_class

    return register


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have in common. `time` and `writer` are filled in when the event is stored and read."""

    KIND: ClassVar[str] = ""

    time: float = 0.0  # when it happened by its writer's clock, in seconds since 1970; never before the writer's last
    writer: str = ""  # name of the writer's file, without its suffix


@_kind("intended")
@dataclass(frozen=True, kw_only=True)
class Intended(Event):
    """A job for `stage` is about to be queued; its comment will hold `nonce`, by which it can be adopted later."""

    stage: str  # a stage's name, "recovery" for the recovery job, or "arrays" in a sweep's own events
    nonce: str


@_kind("submitted")
@dataclass(frozen=True, kw_only=True)
class Submitted(Event):
    """sbatch has queued the job `job_id`, which will run `stage`."""

    stage: str  # a stage's name, "recovery", "image" for the job that builds the image, or a sweep's "arrays"
    job_id: str  # Slurm's, of an array's task ARRAY_INDEX; the process id of a run without Slurm; "" of "arrays"
    nonce: str = ""
    after_attempt: int = 0  # attempts that the stage had before this job
    automatic: bool = False  # queued by the recovery job or the sweep controller, not on a person's request
    prepared_by: str | None = None  # name of the sweep's point whose prepare job this is, where it is not the run's own
    mem_mib: int | None = None  # memory requested on each node, in MiB
    node_mem_mib: int | None = None  # memory that a node of the partition offers, in MiB


@_kind("started")
@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Rank 0 of an attempt runs."""

    stage: str
    attempt: int
    job_id: str
    node: str = ""
    image: str | None = None  # Apptainer image that it runs in
    gpus: int | None = None  # GPUs that its job has on a node; None without Slurm


@_kind("resumed")
@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """A training attempt continues from the checkpoint of `step` (0: from the beginning)."""

    stage: str
    attempt: int
    step: int
    rejected: tuple[str, ...] = ()  # why newer checkpoints were not used


@_kind("first_step")
@dataclass(frozen=True, kw_only=True)
class FirstStep(Event):
    """A training attempt has made its first step."""

    stage: str
    attempt: int
    step: int
    parts_s: Mapping[str, float] = field(default_factory=dict)  # part of the start (load_s, …) -> seconds


@_kind("checkpoint")
@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """The checkpoint of `step` is committed."""

    stage: str
    attempt: int
    step: int
    seconds: float = 0.0  # what the save took
    bytes: int = 0


@_kind("progress")
@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """A piece of a stage's work (a file, a batch of answers, a GB of a download) is committed and not done again."""

    stage: str
    attempt: int
    piece: str


@_kind("ended")
@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """What an attempt itself reports of its end, after its outcome was written."""

    stage: str
    attempt: int
    code: int  # exit code: 0 done, 64 wrong input, 75 saved and to be run again, 76 bad node, else a failure
    message: str = ""
    seconds: float = 0.0  # how long it ran
    signal_s: float | None = None  # from the signal to stop until its end; None where none came


@_kind("settled")
@dataclass(frozen=True, kw_only=True)
class Settled(Event):
    """Why an attempt ended, as found by its epilogue or, where none ran, by a later process."""

    stage: str
    attempt: int
    job_id: str
    cause: str  # one of diagnosis.Cause
    by: Settler
    message: str = ""  # the cause in a sentence
    line: str = ""  # the line of a log that shows it; empty where something else does
    code: int | None = None  # exit code that srun returned; None where nobody saw it
    node: str = ""
    rank: int | None = None  # rank whose log shows it
    ended: float | None = None  # when it ended by Slurm's accounting, in seconds since 1970


@_kind("decided")
@dataclass(frozen=True, kw_only=True)
class Decided(Event):
    """What was decided after an attempt, or after a job that ended before an attempt could begin."""

    stage: str
    choice: Choice
    job_id: str = ""
    attempt: int = 0  # the attempt that had ended; 0 where none had begun
    cause: str = ""
    message: str = ""
    code: int = 0  # exit code of the job where it was stopped


@_kind("override")
@dataclass(frozen=True, kw_only=True)
class Override(Event):
    """A stored number or a derived request is changed from now on (see overrides.py for the fields)."""

    field: str
    value: Any
    who: str  # a user's name, or "ftlib"
    why: str
    after: str = ""  # STAGE-ATTEMPT whose end led to it, which must not lead to it twice; empty where a person did
    until: float | None = None  # the override ends then, in seconds since 1970; None: it stays


@_kind("cancelled")
@dataclass(frozen=True, kw_only=True)
class Cancelled(Event):
    """The owner has cancelled the job of `stage`: it must not start again without a request of the owner's."""

    stage: str
    job_id: str = ""  # empty where the stage had no job yet
    user: str | None = None


@_kind("resume")
@dataclass(frozen=True, kw_only=True)
class ResumeRequested(Event):
    """The owner wants the run to continue: budgets begin anew; what was stopped or cancelled may be queued again."""

    user: str | None = None
    after_attempts: Mapping[str, int] = field(default_factory=dict)  # stage -> attempts that it had then


@_kind("moved")
@dataclass(frozen=True, kw_only=True)
class Moved(Event):
    """The run folder was moved or copied; from here on it lives at `to`, and jobs queued before are not its own."""

    to: str


# -- writing -----------------------------------------------------------------------------------------------------------


def submit_writer() -> str:
    """Name of this process as a writer on the login node."""
    return f"submit-{socket.gethostname()}-{os.getpid()}"


def now(not_before: float = 0.0) -> str:
    """This moment, or a microsecond after `not_before` (seconds since 1970) where this machine's clock is behind it, as
    an event's row has it: ISO 8601, UTC."""
    moment = datetime.datetime.now(datetime.timezone.utc)
    if not_before >= moment.timestamp():
        moment = datetime.datetime.fromtimestamp(not_before, datetime.timezone.utc) + datetime.timedelta(microseconds=1)
    return moment.isoformat(timespec="microseconds")


def append(folder: Path, writer: str, *events: Event, not_before: float = 0.0) -> None:
    """Add events of one moment to the writer's own file in `folder`, and flush them to storage.

    not_before: the time (seconds since 1970) of the latest event that the writer knew of. Clocks of a cluster's
    machines differ, and what follows from an event must not be older.
    """
    folder.mkdir(exist_ok=True)
    moment = now(not_before)
    text = "".join(f"{json.dumps(to_row(event, moment), ensure_ascii=False)}\n" for event in events)
    with (folder / f"{writer}.jsonl").open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def progressed(run: Path, stage: str, attempt: int, piece: str) -> None:
    """Record that a piece of the stage's work is committed: an interruption after it counts against no budget."""
    append(run / "events", f"{stage}-{attempt}", Progress(stage=stage, attempt=attempt, piece=piece))


def to_row(event: Event, now: str) -> dict[str, Any]:
    """The JSON object of an event that happens at `now` (ISO 8601)."""
    row: dict[str, Any] = {"format": FORMAT, "time": now, "event": event.KIND}
    for one in dataclasses.fields(event):
        value = getattr(event, one.name)
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if one.name not in ("time", "writer") and (required or value != one.default):
            row[one.name] = value
    return row


# -- reading -----------------------------------------------------------------------------------------------------------


def read(folder: Path | str) -> list[Event]:
    """All events of a run, oldest first; those of one writer keep their order even where its clock was set back.

    A line that a crash cut short, and an event of a kind that this version does not know, are left out.
    """
    events: list[Event] = []
    for name in sorted(_names(folder)):
        if name.endswith(".jsonl"):
            with open(f"{folder}/{name}", encoding="utf-8", errors="replace") as file:
                lines = file.read().split("\n")
            events += of_writer(name[: -len(".jsonl")], _parsed(lines))
    return sorted(events, key=operator.attrgetter("time"))


def of_writer(writer: str, rows: Iterable[Any]) -> Iterable[Event]:
    """The events in the rows of one writer's file, in order."""
    latest = 0.0
    for row in rows:
        if not isinstance(row, dict) or "time" not in row or "event" not in row:
            continue
        try:
            latest = max(latest, datetime.datetime.fromisoformat(row["time"]).timestamp())
            read_row = from_row if "format" in row else _from_earlier_row
            event = read_row(row, time=latest, writer=writer)
        except (TypeError, ValueError, KeyError):
            continue
        if event is not None:
            yield event


def from_row(row: Mapping[str, Any], *, time: float, writer: str) -> Event | None:
    """The event of a JSON object; None for a kind of a later version. Fields of a later version are left out."""
    event_class = KINDS.get(row["event"])
    if event_class is None:
        return None
    fields = _fields(event_class)
    values = {name: value for name, value in row.items() if name in fields.stored}
    if "rejected" in values:
        values["rejected"] = tuple(values["rejected"])
    values["time"] = time
    values["writer"] = writer
    if not fields.necessary.issubset(values):
        return event_class(**values)
    # What __init__ would do, but all fields at once: that of a frozen class takes longer than all else of reading. A
    # field that is left out has its default as an attribute of the class.
    event = object.__new__(event_class)
    event.__dict__.update(values)
    return event


def _from_earlier_row(row: Mapping[str, Any], *, time: float, writer: str) -> Event | None:
    from ftlib.runs import earlier  # which makes objects of the classes here

    return earlier.event(row, time, writer)


class _Fields(NamedTuple):
    """Names of a class's fields."""

    stored: frozenset[str]  # in the rows of files
    necessary: frozenset[str]  # without a plain default


_FIELDS: dict[type[Event], _Fields] = {}


def _fields(event_class: type[Event]) -> _Fields:
    if event_class not in _FIELDS:
        fields = dataclasses.fields(event_class)
        _FIELDS[event_class] = _Fields(
            stored=frozenset(one.name for one in fields if one.name not in ("time", "writer")),
            necessary=frozenset(one.name for one in fields if one.default is dataclasses.MISSING),
        )
    return _FIELDS[event_class]


def _parsed(lines: list[str]) -> Iterable[Any]:
    try:  # All at once is twice as fast, and thousands of runs are read for one look at them.
        return list(json.loads(f"[{','.join(filter(None, lines))}]"))
    except ValueError:
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows


def _names(folder: Path | str) -> list[str]:
    """Names of the files in a folder; none where it does not exist (a copy may leave out what is empty)."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
