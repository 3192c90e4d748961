"""`logs`: what the newest life of a run wrote; with --follow every life after it, too, of every stage, to the end.
And a log shown as it grows, for those who wait for one job."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ftlib import rundir, state
from ftlib.errors import DONE, InputError, unknown
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.runs.attempts import Attempt
from ftlib.runs.events import Submitted
from ftlib.runs.ledger import Ledger
from ftlib.slurm import queue
from ftlib.state import ACTIVE
from jobs.look import see_one
from jobs.wish import RUNS

EVERY_S = 0.5
# How often a followed run's state is asked for; its own files tell most ends at once.
ASK_S = 10.0
# Results of other machines show late on a network file system.
LATE_S = 15


@dataclass(frozen=True)
class Part:
    """One life's part of the log of its first rank: from byte `start` on. Life 0: the job ended before a life began."""

    stage: str
    life: int
    path: Path
    start: int = 0


def logs(options: argparse.Namespace) -> int:
    """Print the newest life's log, or that of a stage; Ctrl-C ends the following."""
    run = rundir.find(RUNS, options.run)
    if options.stage and options.stage not in STAGES:
        raise InputError(unknown("STAGE", options.stage, STAGES))
    wanted = (options.stage,) if options.stage else STAGES
    if options.follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(run, wanted)
    elif part := newest(run, wanted):
        _show(part, part.start)
    else:
        print(f"{run.name}: no log yet. {_now(run, wanted)[1]}".rstrip())
    return DONE


def _follow(run: RunDir, wanted: tuple[str, ...]) -> None:
    shown: Part | None = None
    at, asked = 0, 0.0
    goes_on, words = True, ""
    while True:
        if time.monotonic() - asked > ASK_S or all(run.stage_done(stage) for stage in wanted):
            asked = time.monotonic()
            before = words
            goes_on, words = _now(run, wanted)
            if goes_on and shown is None and words != before:
                print(f"{run.name}: no log yet. {words}", file=sys.stderr)
        part = newest(run, wanted)
        if shown:
            at = _show(shown, at, heading=False)
        if part and part != shown:
            # Lives of one job append to one file.
            at = _show(part, at if shown and shown.path == part.path else part.start)
            shown = part
        if not goes_on:
            print(f"{run.name}: {words}", file=sys.stderr)
            return
        time.sleep(EVERY_S)


def newest(run: RunDir, wanted: tuple[str, ...]) -> Part | None:
    """The part of the life that began last, of the stages `wanted`; None before any log is there."""
    with rundir.reading(run.path):
        known = run.ledger()
    attempts = [attempt for stage in wanted for attempt in known.attempts.get(stage, ())]
    begun = [attempt for attempt in attempts if attempt.began]  # else it is being written
    if begun:
        last = max(begun, key=lambda one: (one.began, wanted.index(one.stage), one.number))
        path = run.slurm / last.stage / f"{_job(known, last)}_0_log.out"
        start = last.log_starts.get(path.name, 0)
        return Part(last.stage, last.number, path, start) if path.exists() else None
    logs = [path for stage in wanted for path in (run.slurm / stage).glob("*_log.out")]
    path = max(logs, key=lambda path: path.stat().st_mtime, default=Path())
    return Part(path.parent.name, 0, path) if logs else None


def _job(known: Ledger, attempt: Attempt) -> str:
    """The job as its log's name has it: a foreground life's own file names the process that started the job."""
    if attempt.node != "local":
        return attempt.job_id
    submitted = known.of(Submitted, attempt.stage)
    return next((one.job_id for one in submitted if one.after_attempt == attempt.number - 1), attempt.job_id)


def _show(part: Part, start: int, *, heading: bool = True) -> int:
    """Print what the log holds from byte `start` on; returns where it ends."""
    if heading:
        sys.stdout.flush()
        words = f"{part.stage}, life {part.life}" if part.life else f"{part.stage}, before its first life"
        print(f"==> {words}: {part.path}", file=sys.stderr, flush=True)
    with part.path.open("rb") as file:
        # A file that is shorter now was replaced by a copy's, or truncated by hand.
        file.seek(min(start, file.seek(0, 2)))
        sys.stdout.buffer.write(file.read())
        sys.stdout.buffer.flush()
        return file.tell()


def _now(run: RunDir, wanted: tuple[str, ...]) -> tuple[bool, str]:
    """Whether more may come in one of the stages, and the state of the last that is not done."""
    seen = see_one(run, fresh=False)
    open_stages = [stage for stage in wanted if seen.stages[stage].state != "completed"]
    if not open_stages:
        return False, "completed"
    first = seen.stages[open_stages[0]]
    job = seen.answer.jobs.get(first.job_id or "")
    words = first.words
    if first.state == "queued" and job and state.SLURM_STATES.get(job.state) == "queued":
        words = queue.why_waits(job, time.time())
    goes_on = first.state in ACTIVE or (seen.will_recover and first.state == "failed")
    return goes_on, f"{open_stages[0]} is {first.state}" + (f": {words}" if words else "")


# -- a log alone -------------------------------------------------------------------------------------------------------


def show(log: Path, shown: int = 0, *, last: bool = False) -> int:
    """Print whole new lines of the log after byte `shown`, submitit's own left out; returns the new position."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    whole = new if last else new[: new.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        if line and not line.startswith("submitit "):
            print("    " + line, flush=True)
    return shown + len(whole)


def follow(job: str, log: Path, profile: ClusterProfile, done: Callable[[], object]) -> str:
    """Show a job's log until `done()`, or until Slurm says that it has ended; returns Slurm's last word of it."""
    assert profile.scheduler  # which is asked as rarely as its site wants
    shown, told, asked, deadline = 0, "", -math.inf, math.inf
    while not done() and time.monotonic() < deadline:
        shown = show(log, shown)
        if time.monotonic() - asked > max(1.0, profile.scheduler.poll_interval_s) and deadline == math.inf:
            asked, found = time.monotonic(), queue.ask([job]).jobs[job]
            words = (found.state or "UNKNOWN") + (f" ({found.reason})" if found.reason not in ("", "None") else "")
            if state.SLURM_STATES.get(found.state) not in state.ACTIVE:
                deadline = asked + (0 if found.state == "CANCELLED" else LATE_S)
            elif words != told:
                print(f"job {job}: {words}", flush=True)
            told = words
        time.sleep(1)
    show(log, shown, last=True)
    return told
