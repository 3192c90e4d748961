"""What happened in each life of a run, and what to do now, in plain words. From the run folder's files alone."""

import datetime
import re
import time

from rich.console import Console

from ftlib import checkpoint
from ftlib.errors import RUN_AGAIN
from ftlib.report.status import Seen
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import policy
from ftlib.runs.attempts import Attempt
from ftlib.runs.decide import QueueAnew
from ftlib.runs.events import CheckpointSaved, Decided, Ended, FirstStep, Resumed, Started
from ftlib.runs.overrides import EXCLUDE, MICRO_BATCH
from ftlib.slurm.queue import why_waits
from ftlib.state import ACTIVE, overall

# How an attempt that was told to stop begins its message: what the signal most often means.
WARNED = re.compile(r"^interrupted \((?:preemption|time limit)\)")
# The parts of a life's start, as the training tells them in its first step's event.
PARTS = {
    "imports_s": "imports", "check_s": "data and checkpoint", "load_s": "model", "optimizer_s": "optimizer",
    "validation_s": "validation", "first_step_s": "first step"}  # fmt: skip


def print_why(seen: Seen, out: Console) -> None:
    """The whole story, and the next thing a person should do."""
    run, cause = seen.run, ""
    lines = [f"{run.name}: {overall(seen.stages)}", *(f"  note: {note}" for note in seen.notes)]
    for stage in STAGES:
        for attempt in seen.known.attempts.get(stage, ()):
            told, of_life = _life(seen, attempt)
            lines += told
            cause = of_life if seen.stages[stage].state == "failed" else cause
    lines += [f"  changed: {note}" for note in _changes(seen)]
    out.print(*lines, f"What to do now: {_advice(seen, cause)}", sep="\n")


def _life(seen: Seen, attempt: Attempt) -> tuple[list[str], str]:
    """What its writers recorded, as lines; and the cause of its end, empty where none is known."""
    known, stage, life = seen.known, attempt.stage, attempt.number
    place = f"on {attempt.node or '?'}"
    if started := known.last(Started, stage, life):
        at = datetime.datetime.fromtimestamp(started.time, datetime.timezone.utc)
        place += f", {at:%Y-%m-%d %H:%M:%S} UTC"
    if (resumed := known.last(Resumed, stage, life)) and resumed.step:
        place += f", from step {resumed.step}"
    if saved := known.last(CheckpointSaved, stage, life):
        place += f", last save at step {saved.step}"
    lines = [f"  {stage}, life {life} ({place})"]
    if first_step := known.last(FirstStep, stage, life):
        before = known.last(Ended, stage, life - 1)
        signalled = before is not None and before.code == RUN_AGAIN and before.signal_s
        lines.append(f"    {_restart(first_step, before if signalled else None)}")
    settled = known.settled(stage).get(life)
    decided = known.last(Decided, stage, life)
    message = settled.message if settled else ""
    if settled and decided and decided.writer == settled.writer and settled.by == "epilogue":
        message = decided.message
    end = known.outcome(stage, life)
    ended = _corrected(end.message if end else "", settled.cause if settled else "")
    lines.append(f"    {ended or message or seen.stages[stage].state}")
    if settled:
        lines.append(f"    cause: {settled.cause}; {message}")
        if settled.cause == "unknown" and settled.message != message:
            lines.append(f"    what is known: {settled.message}")
        if settled.line and settled.line not in ended:
            lines.append(f"    seen in: {settled.line}")
    return lines, settled.cause if settled else ""


def _corrected(message: str, cause: str) -> str:
    """An attempt's own message with the cause as it was settled: a process does not know who sent it a signal."""
    return WARNED.sub(f"interrupted ({cause})", message) if cause else message


def _changes(seen: Seen) -> list[str]:
    """What was changed since the run was submitted, with the reason, oldest first."""
    lines = []
    rows: int | None = seen.run.plan().get("micro_batch")
    for override in seen.known.overrides(time.time()).history:
        if override.field == MICRO_BATCH:
            if override.value is not None:
                lines.append(f"micro-batch {rows} -> {override.value}: {override.why}")
            rows = override.value or seen.run.plan().get("micro_batch")
        elif override.field.startswith(EXCLUDE):
            hours = f" for {(override.until - override.time) / 3600:.0f} h" if override.until else ""
            lines.append(f"node {override.field.removeprefix(EXCLUDE)} is left out{hours}: {override.why}")
        else:
            lines.append(f"{override.field} = {override.value}: {override.why}")
    return lines


def _restart(first_step: FirstStep, saved: Ended | None) -> str:
    """How long the first step was waited for; `saved`: how the life before ended, where a signal ended it."""
    parts = {words: float(first_step.parts_s[key]) for key, words in PARTS.items() if first_step.parts_s.get(key)}
    total = sum(parts.values())
    if saved:
        between = first_step.time - saved.time - total
        parts = {"saving": saved.signal_s or 0.0, "the queue": max(0.0, between), **parts}
        total = sum(parts.values())
    since = "the signal" if saved else "its process began"
    return f"first new step {total:.1f} s after {since}: " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items())


def _advice(seen: Seen, cause: str) -> str:
    run, stages = seen.run, seen.stages
    now = overall(stages)
    if now in ("completed", *ACTIVE):
        waiting = next((stage for stage in stages.values() if stage.state == "queued"), None)
        job = seen.answer.jobs.get(waiting.job_id or "") if waiting else None
        return f"nothing. {why_waits(job, time.time()).capitalize()}." if job and now == "queued" else "nothing."
    if now == "cancelled":
        return f"nothing; make resume RUN={run.name} would go on."
    if isinstance(seen.action, QueueAnew):
        if seen.will_recover:
            return "nothing. The recovery job will queue it again in a moment."
        return f"make resume RUN={run.name}."
    if seen.action and seen.action.cause:
        cause = seen.action.cause
    kind = policy.KINDS.get(cause)  # type: ignore[call-overload]
    broken = next(name for name, s in stages.items() if s.state == "failed")
    text = kind.mend if kind else f"make logs RUN={{run}} STAGE={broken}; after the mend, make resume RUN={{run}}"
    return str(text).format(run=run.name) + "."


def print_verify(run: RunDir, out: Console) -> bool:
    """Check every committed checkpoint; names the one a new life would go on from. False when one is damaged."""
    folders = checkpoint.committed(run.checkpoints)
    damage = {folder: checkpoint.problems(folder, run=run.name) for folder in folders}
    for folder, why in damage.items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        line = f"  {folder.name}  {size / 2**20:,.1f} MiB  {'DAMAGED' if why else 'whole'}"
        out.print(line, *(f"    {reason}" for reason in why), sep="\n")
    if not folders:
        out.print(f"{run.name} has no checkpoint yet.")
    elif chosen := next((folder for folder in folders if not damage[folder]), None):
        out.print(f"A new life would go on from {chosen.name}.")
    else:
        out.print("None can be used: a new life would begin at step 0.")
    return not any(damage.values())
