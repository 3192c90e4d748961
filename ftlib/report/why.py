"""What happened in each life of a run, and what to do now, in plain words. From the run folder's files alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ftlib import checkpoint
from ftlib.report.cost import time_of
from ftlib.report.status import Seen
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import policy
from ftlib.slurm.queue import why_waits
from ftlib.state import ACTIVE, Journal, overall

# The parts of a life's start, as the training tells them in its first step's event.
PARTS = {
    "imports_s": "imports", "check_s": "data and checkpoint", "load_s": "model", "optimizer_s": "optimizer",
    "validation_s": "validation", "first_step_s": "first step",
}  # fmt: skip


@dataclass
class LifeStory:
    """One life, as its writers recorded it."""

    life: int
    node: str = "?"
    started: str = ""
    from_step: int | None = None
    last_step: int | None = None
    ended: str = ""
    cause: str = ""
    line: str = ""
    done_about_it: str = ""
    restart: str = ""  # how long its start took, from the signal that ended the life before


def stories(run: RunDir, known: Journal, stage: str) -> list[LifeStory]:
    """Every life of a stage, first life first."""
    found: dict[int, LifeStory] = {}
    for path in run.lives.glob(f"{stage}-*"):
        words = path.read_text(encoding="utf-8").split()
        life = int(path.name.removeprefix(f"{stage}-"))
        found[life] = LifeStory(life, node=words[1] if len(words) > 1 else "?")
    saved: dict[str, Any] = {}  # how the last life said that it was interrupted
    for event in known.log:
        if event.get("stage") != stage or event.get("life") not in found:
            continue
        story = found[event["life"]]
        _tell(story, event)
        if event["event"] == "first_step":
            story.restart = _restart(event, saved if saved.get("life") == story.life - 1 else {})
        elif event["event"] == "interrupted" and event.get("signal_s"):
            saved = event
    for end in known.ends[stage]:
        if end.life in found:
            found[end.life].ended = end.words
    return [found[life] for life in sorted(found)]


def _tell(story: LifeStory, event: dict[str, Any]) -> None:
    name = event["event"]
    if name == "started":
        story.started = str(event["time"])[:19].replace("T", " ")
    elif name == "resumed":
        story.from_step = event.get("step")
    elif name == "checkpoint":
        story.last_step = event.get("step")
    if "cause" in event and name in ("requeued", "failed", "interrupted"):
        story.cause, story.line = str(event["cause"]), str(event.get("line", ""))
        story.done_about_it = str(event.get("words", ""))


def _restart(first_step: dict[str, Any], saved: dict[str, Any]) -> str:
    """How long the first step was waited for; `saved`: the event of the life before that a signal ended, or nothing."""
    parts = {words: float(first_step[key]) for key, words in PARTS.items() if first_step.get(key)}
    total = sum(parts.values())
    if saved:
        between = (time_of(first_step) - time_of(saved)).total_seconds() - total
        parts = {"saving": saved["signal_s"], "the queue": max(0.0, between), **parts}
        total = sum(parts.values())
    since = "the signal" if saved else "its process began"
    return f"first new step {total:.1f} s after {since}: " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items())


def print_why(seen: Seen, out: Console) -> None:
    """The whole story, and the next thing a person should do."""
    run, stages = seen.run, seen.stages
    cause = ""
    lines = [f"{run.name}: {overall(stages)}", *(f"  note: {note}" for note in seen.notes)]
    for stage in STAGES:
        for story in stories(run, seen.known, stage):
            place = f"on {story.node}" + (f", {story.started} UTC" if story.started else "")
            went = f", from step {story.from_step}" if story.from_step else ""
            saved = f", last save at step {story.last_step}" if story.last_step else ""
            lines.append(f"  {stage}, life {story.life} ({place}{went}{saved})")
            lines += [f"    {story.restart}"] if story.restart else []
            lines.append(f"    {story.ended or story.done_about_it or stages[stage].state}")
            if story.cause:
                lines.append(f"    cause: {story.cause}; {story.done_about_it}")
                if story.line and story.line not in story.ended:
                    lines.append(f"    seen in: {story.line}")
            cause = story.cause if stages[stage].state == "failed" else cause
    lines += [f"  changed: {note}" for note in run.adjustments().get("notes", [])]
    out.print(*lines, f"What to do now: {_advice(seen, cause)}", sep="\n", markup=False)


def _advice(seen: Seen, cause: str) -> str:
    run, stages = seen.run, seen.stages
    now = overall(stages)
    if now in ("completed", *ACTIVE):
        waiting = next((stage for stage in stages.values() if stage.state == "queued"), None)
        job = seen.answer.jobs.get(waiting.job_id or "") if waiting else None
        return f"nothing. {why_waits(job, time.time()).capitalize()}." if job and now == "queued" else "nothing."
    if now == "cancelled":
        return f"nothing; make resume RUN={run.name} would go on."
    kind = policy.KINDS.get(cause)  # type: ignore[call-overload]
    broken = next(name for name, s in stages.items() if s.state == "failed")
    text = kind.mend if kind else f"make logs RUN={{run}} STAGE={broken}; after the mend, make resume RUN={{run}}"
    return str(text).format(run=run.name) + "."


def print_verify(run: RunDir, out: Console) -> bool:
    """Check every committed checkpoint; names the one a new life would go on from. False when one is damaged."""
    folders = checkpoint.committed(run.checkpoints)
    chosen, sound = None, True
    for folder in folders:
        why = checkpoint.problems(folder, run=run.name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        out.print(f"  {folder.name}  {size / 2**20:,.1f} MiB  {'whole' if not why else 'DAMAGED'}", markup=False)
        for reason in why:
            out.print(f"    {reason}", markup=False)
        chosen = chosen or (folder if not why else None)
        sound = sound and not why
    if not folders:
        out.print(f"{run.name} has no checkpoint yet.", markup=False)
    elif chosen:
        out.print(f"A new life would go on from {chosen.name}.", markup=False)
    else:
        out.print("None can be used: a new life would begin at step 0.", markup=False)
    return sound
