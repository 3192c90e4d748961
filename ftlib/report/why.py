"""What happened in each life of a run, and what to do now, in plain words. From the run folder's files alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ftlib import checkpoint, events, outcome
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import policy
from ftlib.state import StageState, overall


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


def stories(run: RunDir, stage: str) -> list[LifeStory]:
    """Every life of a stage, first life first."""
    found: dict[int, LifeStory] = {}
    for path in run.lives.glob(f"{stage}-*"):
        words = path.read_text(encoding="utf-8").split()
        life = int(path.name.removeprefix(f"{stage}-"))
        found[life] = LifeStory(life, node=words[1] if len(words) > 1 else "?")
    for event in events.read(run.events):
        if event.get("stage") == stage and isinstance(event.get("life"), int) and event["life"] in found:
            _tell(found[event["life"]], event)
    for end in outcome.read(run.outcomes, stage):
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


def print_why(run: RunDir, stages: dict[str, StageState], out: Console) -> None:
    """The whole story, and the next thing a person should do."""
    now = overall(stages)
    out.print(f"{run.name}: {now}", markup=False)
    cause = ""
    for stage in STAGES:
        for story in stories(run, stage):
            place = f"on {story.node}" + (f", {story.started} UTC" if story.started else "")
            went = f", from step {story.from_step}" if story.from_step else ""
            saved = f", last save at step {story.last_step}" if story.last_step else ""
            out.print(f"  {stage}, life {story.life} ({place}{went}{saved})", markup=False)
            out.print(f"    {story.ended or story.done_about_it or stages[stage].state}", markup=False)
            if story.cause:
                out.print(f"    cause: {story.cause}; {story.done_about_it}", markup=False)
                if story.line and story.line not in story.ended:
                    out.print(f"    seen in: {story.line}", markup=False)
            cause = story.cause if stages[stage].state == "failed" else cause
    for note in run.adjustments().get("notes", []):
        out.print(f"  changed: {note}", markup=False)
    out.print(f"What to do now: {_advice(run, stages, cause)}", markup=False)


def _advice(run: RunDir, stages: dict[str, StageState], cause: str) -> str:
    now = overall(stages)
    if now in ("completed", "queued", "running"):
        waiting = next((s.words for s in stages.values() if s.state == "queued" and s.words), "")
        return "nothing." + (f" It waits: {waiting}." if waiting and waiting != "Dependency" else "")
    if now == "cancelled":
        return f"nothing; make resume RUN={run.name} would go on."
    mend = policy.MEND.get(cause)  # type: ignore[call-overload]
    broken = next(name for name, s in stages.items() if s.state == "failed")
    text = mend or f"make logs RUN={{run}} STAGE={broken}; after the mend, make resume RUN={{run}}"
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
