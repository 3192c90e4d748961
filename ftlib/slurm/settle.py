"""Settle how a life of a stage ended, on the host: what the epilogue asks, and the next life's prologue.

    python -m ftlib.slurm.settle end RUN STAGE LIFE CODE JOB LOG     after srun; prints what the shell does:
        requeue BACKOFF_S NODE_TO_EXCLUDE|- MEM_MIB|- WORDS
        leave EXIT_CODE WORDS      it would be requeued, but this site forbids it: the guard queues it anew
        stop EXIT_CODE WORDS
    python -m ftlib.slurm.settle earlier RUN STAGE LIFE              before srun: lives that no epilogue saw the end of

Standard library only: the host of a container may have nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ftlib import atomic, events
from ftlib.slurm import diagnose, policy
from ftlib.slurm.policy import Life

ADJUSTMENTS = "adjustments.json"
EXCLUSION_H = 24


def end(run: Path, stage: str, life: int, code: int, job: str, log: Path) -> str:
    """Decide about the life that has just ended; records it and returns the line for the shell."""
    outcome = _outcome(run, stage, life)
    text = diagnose.tail(log, start=_log_start(run, stage, life))
    found = diagnose.life_cause(code=outcome[0] if outcome else code, outcome=outcome[1] if outcome else None, log=text)
    lives = [*settled_lives(run, stage, life), Life(found.cause, _progressed(run, stage, life))]
    adjusted = adjustments(run)
    decision = policy.decide(lives, micro_batch=adjusted.get("micro_batch") or _micro_batch(run, stage))
    node, memory = "-", "-"
    if decision.requeue:
        if decision.halve_micro_batch:
            _halve(run, adjusted, found.line)
        if decision.exclude_node:
            node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
            _exclude(run, adjusted, node, found.line)
        asked = os.environ.get("SLURM_MEM_PER_NODE", "")
        if decision.memory_factor != 1 and asked.isdigit():
            memory = str(int(int(asked) * decision.memory_factor))
    may_requeue = os.environ.get("FT_REQUEUE", "1") == "1"
    event: events.Name = "failed" if not decision.requeue else "requeued" if may_requeue else "interrupted"
    events.append(
        run / "events", f"{stage}-{life}-epilogue", event, stage=stage, life=life, job_id=job, code=code,
        cause=found.cause, line=found.line, words=decision.words, node=os.uname().nodename,
    )  # fmt: skip
    if decision.requeue and not may_requeue:
        return f"leave 75 {decision.words}"
    if decision.requeue:
        return f"requeue {decision.backoff_s} {node} {memory} {decision.words}"
    final = outcome[0] if outcome and outcome[0] not in (0, 75) else (code or 1)
    return f"stop {final} {decision.words}"


def earlier(run: Path, stage: str, life: int, writer: str) -> None:
    """Record the cause of every life before `life` whose end no epilogue saw: node or batch shell were lost."""
    settled = {event["life"] for event in events.read(run / "events") if _settles(event, stage)}
    for number in range(1, life):
        if number in settled:
            continue
        job = (run / "lives" / f"{stage}-{number}").read_text(encoding="utf-8").split(" ")[0]
        state = _accounted(job, _life_of_job(run, stage, number, job))
        cause = diagnose.ACCOUNTED.get(state.split(" ")[0], "node failure")
        words = f"{diagnose.PLAIN[cause]} (Slurm says {state})" if state else "its node or its batch shell was lost"
        events.append(
            run / "events", writer, "interrupted", stage=stage, life=number, job_id=job, cause=cause, words=words,
            settled_by=writer,
        )  # fmt: skip


def adjustments(run: Path) -> dict[str, Any]:
    """What earlier lives taught: micro_batch, and nodes to keep away from with the time until which."""
    try:
        value = json.loads((run / ADJUSTMENTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    assert isinstance(value, dict)
    return value


def excluded_nodes(run: Path, now: float | None = None) -> list[str]:
    """Nodes that were bad within the last day."""
    moment = time.time() if now is None else now
    return sorted(node for node, until in adjustments(run).get("exclude", {}).items() if until > moment)


def _settles(event: dict[str, Any], stage: str) -> bool:
    return event.get("stage") == stage and (
        str(event["writer"]).endswith("-epilogue") or (event["event"] == "interrupted" and "settled_by" in event)
    )


def settled_lives(run: Path, stage: str, life: int) -> list[Life]:
    """Why the stage's lives before `life` ended, since a person last submitted or resumed it; oldest first."""
    known: dict[int, diagnose.Cause] = {}
    first = 1
    for event in events.read(run / "events"):
        if event["event"] == "submitted" and event.get("stage") == stage and not event.get("guard"):
            first = int(event.get("after_life", 0)) + 1
        elif _settles(event, stage) and event.get("cause") in policy.BUDGET:
            known[int(event["life"])] = event["cause"]
    return [Life(known[n], _progressed(run, stage, n)) for n in range(first, life) if n in known]


def _progressed(run: Path, stage: str, life: int) -> bool:
    """Whether the life committed a checkpoint of a step that no earlier life had reached."""
    best: dict[int, int] = {}
    for event in events.read(run / "events"):
        if event["event"] == "checkpoint" and event.get("stage") == stage:
            best[int(event["life"])] = max(int(event["step"]), best.get(int(event["life"]), 0))
    before = max((step for number, step in best.items() if number < life), default=0)
    return best.get(life, 0) > before


def _outcome(run: Path, stage: str, life: int) -> tuple[int, str] | None:
    try:
        code, _, words = (run / "outcomes" / f"{stage}-{life}").read_text(encoding="utf-8").strip().partition(" ")
    except FileNotFoundError:
        return None
    return (int(code), words) if code.isdigit() else None


def _log_start(run: Path, stage: str, life: int) -> int:
    """Where this life's part of the appended log begins; the prologue wrote it down."""
    words = (run / "lives" / f"{stage}-{life}").read_text(encoding="utf-8").split()
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else 0


def _micro_batch(run: Path, stage: str) -> int | None:
    if stage != "train":
        return None
    return int(json.loads((run / "plan.json").read_text(encoding="utf-8"))["micro_batch"])


def _halve(run: Path, adjusted: dict[str, Any], why: str) -> None:
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    rows = adjusted.get("micro_batch") or plan["micro_batch"]
    whole = plan["micro_batch"] * plan["accumulation"]
    smaller = next(size for size in range(rows // 2, 0, -1) if whole % size == 0)
    notes = [*adjusted.get("notes", []), f"micro-batch {rows} -> {smaller}: {why}"]
    changed = {**adjusted, "micro_batch": smaller, "accumulation": whole // smaller, "notes": notes}
    atomic.write_json(run / ADJUSTMENTS, changed)


def _exclude(run: Path, adjusted: dict[str, Any], node: str, why: str) -> None:
    until = time.time() + EXCLUSION_H * 3600
    notes = [*adjusted.get("notes", []), f"node {node} is left out for {EXCLUSION_H} h: {why}"]
    changed = {**adjusted, "exclude": {**adjusted.get("exclude", {}), node: until}, "notes": notes}
    atomic.write_json(run / ADJUSTMENTS, changed)


def _life_of_job(run: Path, stage: str, life: int, job: str) -> int:
    """The how-manieth life of its own job this one was: sacct lists a job's lives in order."""
    files = (run / "lives" / f"{stage}-{number}" for number in range(1, life + 1))
    return sum(path.exists() and path.read_text(encoding="utf-8").split(" ")[0] == job for path in files)


def _accounted(job: str, nth: int) -> str:
    """Slurm's state of the job's `nth` life; empty where accounting has no answer."""
    command = ["sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", "State"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    states = done.stdout.split("\n")
    return states[nth - 1].strip() if done.returncode == 0 and len(states) >= nth else ""


def main(words: list[str]) -> None:
    """The command line that the shell calls."""
    what, run, stage, life = words[0], Path(words[1]), words[2], int(words[3])
    if what == "earlier":
        earlier(run, stage, life, f"{stage}-{life}-prologue")
    else:
        code, job, log = words[4:7]
        print(end(run, stage, life, int(code), job, Path(log)))


if __name__ == "__main__":
    main(sys.argv[1:])
