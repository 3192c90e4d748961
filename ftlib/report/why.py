"""What happened in each life of a run, and what to do now, in plain words. From the run folder's files alone."""

import time
from typing import Any

from rich.console import Console

from ftlib import checkpoint
from ftlib.report.cost import time_of
from ftlib.report.status import Seen
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import policy
from ftlib.slurm.queue import why_waits
from ftlib.state import ACTIVE, overall

# The parts of a life's start, as the training tells them in its first step's event.
PARTS = {
    "imports_s": "imports", "check_s": "data and checkpoint", "load_s": "model", "optimizer_s": "optimizer",
    "validation_s": "validation", "first_step_s": "first step"}  # fmt: skip


def print_why(seen: Seen, out: Console) -> None:
    """The whole story, and the next thing a person should do."""
    run, cause = seen.run, ""
    lines = [f"{run.name}: {overall(seen.stages)}", *(f"  note: {note}" for note in seen.notes)]
    for stage in STAGES:
        for life in sorted(int(path.name.rpartition("-")[2]) for path in run.lives.glob(f"{stage}-*")):
            told, of_life = _life(seen, stage, life)
            lines += told
            cause = of_life if seen.stages[stage].state == "failed" else cause
    lines += [f"  changed: {note}" for note in run.adjustments().get("notes", [])]
    out.print(*lines, f"What to do now: {_advice(seen, cause)}", sep="\n")


def _life(seen: Seen, stage: str, life: int) -> tuple[list[str], str]:
    """What its writers recorded, as lines; and the cause of its end, empty where none is known."""
    log = [event for event in seen.known.log if event.get("stage") == stage]
    mine = [event for event in log if event.get("life") == life]
    last: dict[str, dict[str, Any]] = {event["event"]: event for event in mine}
    words = (seen.run.lives / f"{stage}-{life}").read_text(encoding="utf-8").split()
    place = f"on {words[1]}" if len(words) > 1 else "on ?"
    place += f", {last['started']['time'][:19].replace('T', ' ')} UTC" if "started" in last else ""
    place += f", from step {step}" if (step := last.get("resumed", {}).get("step")) else ""
    place += f", last save at step {step}" if (step := last.get("checkpoint", {}).get("step")) else ""
    lines = [f"  {stage}, life {life} ({place})"]
    if "first_step" in last:
        saved = [e for e in log if e["event"] == "interrupted" and e.get("life") == life - 1 and e.get("signal_s")]
        lines.append(f"    {_restart(last['first_step'], saved[-1] if saved else {})}")
    ends = [e for e in mine if "cause" in e and e["event"] in ("requeued", "failed", "interrupted")]
    end: dict[str, Any] = ends[-1] if ends else {}
    ended = next((one.words for one in reversed(seen.known.ends[stage]) if one.life == life), "")
    lines.append(f"    {ended or end.get('words') or seen.stages[stage].state}")
    if end:
        lines.append(f"    cause: {end['cause']}; {end.get('words', '')}")
    if end.get("line") and end["line"] not in ended:
        lines.append(f"    seen in: {end['line']}")
    return lines, str(end.get("cause", ""))


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
