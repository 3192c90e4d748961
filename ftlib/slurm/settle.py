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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlib import atomic, events
from ftlib.slurm import diagnose, policy
from ftlib.slurm.diagnose import Finding
from ftlib.slurm.policy import Life

ADJUSTMENTS = "adjustments.json"
EXCLUSION_H = 24
# Slurm warns up to a minute before the lead that was asked for, which is two minutes at most.
NEAR_LIMIT_S = 210
# Accounting writes a second or two after the fact, with the controller's clock.
CLOCKS_S = 2
# The exit code of what SIGKILL ended, as a shell says it.
KILLED = 137


@dataclass(frozen=True)
class Verdict:
    """What the epilogue does: requeue, leave it to the guard where the site forbids that, or stop."""

    do: Literal["requeue", "leave", "stop"]
    code: int  # how the job exits where it is not requeued
    words: str
    backoff_s: int = 0
    exclude: str = "-"
    mem_mib: str = "-"

    def line(self) -> str:
        """For the shell."""
        if self.do == "requeue":
            return f"requeue {self.backoff_s} {self.exclude} {self.mem_mib} {self.words}"
        return f"{self.do} {self.code} {self.words}"


def end(run: Path, stage: str, life: int, code: int, job: str, log: Path) -> Verdict:
    """Decide about the life that has just ended, and record it."""
    outcome = _outcome(run, stage, life)
    state = _accounted(run, stage, life, job) if "SLURM_JOB_ID" in os.environ else ""
    logs = _logs(run, stage, life, job, log.parent)
    found = _found(code, outcome, logs, state)
    if found.cause in ("preemption", "time limit") and "SLURM_JOB_ID" in os.environ:
        found = _as_slurm_tells(found, state, run, stage, life, job)
    lives = [*settled_lives(run, stage, life), Life(found.cause, _progressed(run, stage, life))]
    adjusted = adjustments(run)
    decision = policy.decide(lives, micro_batch=adjusted.get("micro_batch") or _micro_batch(run, stage))
    node, memory = "-", "-"
    if decision.requeue:
        if decision.halve_micro_batch:
            _halve(run, adjusted, found.line)
        if decision.exclude_node:
            node = _node_of(next((rank for rank, text in logs.items() if found.line and found.line in text), 0))
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
    if decision.requeue:
        return Verdict("requeue" if may_requeue else "leave", 75, decision.words, decision.backoff_s, node, memory)
    return Verdict("stop", outcome[0] if outcome and outcome[0] not in (0, 75) else (code or 1), decision.words)


def earlier(run: Path, stage: str, life: int, writer: str) -> None:
    """Record the cause of every life before `life` whose end no epilogue saw: node or batch shell were lost."""
    settled = {event["life"] for event in events.read(run / "events") if _settles(event, stage)}
    for number in range(1, life):
        if number in settled:
            continue
        job = (run / "lives" / f"{stage}-{number}").read_text(encoding="utf-8").split(" ")[0]
        state, outcome = _accounted(run, stage, number, job), _outcome(run, stage, number)
        logs = _logs(run, stage, number, job, run / "slurm" / stage)
        found = _found(KILLED, outcome, logs, state)
        cause, words = found.cause, f"{diagnose.PLAIN[found.cause]} (Slurm says {state or 'nothing'})"
        if cause == "killed" and not state:
            cause, words = "node failure", "its node or its batch shell was lost"
        if cause == "preemption" and state.startswith("FAILED"):
            # No epilogue ran and Slurm took nothing back: the batch shell was killed, and slurmd's SIGTERM followed.
            cause, words = "killed", "the batch shell was killed, and nothing says by whom; the work was saved"
        events.append(
            run / "events", writer, "interrupted", stage=stage, life=number, job_id=job, cause=cause, line=found.line,
            words=words, settled_by=writer,
            **({"ended": int(ended)} if (ended := _of_life(run, stage, number, job, "End")).isdigit() else {}),
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
        if event["event"] == "submitted" and event.get("stage") == stage and not event.get("automatic"):
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


def _found(code: int, outcome: tuple[int, str] | None, logs: dict[int, str], state: str) -> Finding:
    said, words = outcome or (code, None)
    return diagnose.life_cause(code=said, outcome=words, log="\n".join(logs.values()), accounted=state)


def _logs(run: Path, stage: str, life: int, job: str, folder: Path) -> dict[int, str]:
    """The end of what each rank wrote in this life; the first one's also has srun's and the shell's words."""
    starts, found = log_starts(run, stage, life), {}
    for path in folder.glob(f"{job}_*_log.out"):
        rank = path.name.removeprefix(f"{job}_").removesuffix("_log.out")
        if rank.isdigit():
            found[int(rank)] = diagnose.tail(path, start=starts.get(path.name, 0))
    return dict(sorted(found.items()))


def _node_of(rank: int) -> str:
    """The node on which a rank ran; this one, which runs rank 0, where that cannot be known."""
    here = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    nodes = _ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", here)).split() if rank else []
    each = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return nodes[rank // int(each)] if each.isdigit() and rank // int(each) < len(nodes) else here


def log_starts(run: Path, stage: str, life: int) -> dict[str, int]:
    """Where this life's part of each rank's appended log begins: the prologue wrote it down as name:bytes."""
    words = (run / "lives" / f"{stage}-{life}").read_text(encoding="utf-8").split()
    pairs = (word.rpartition(":") for word in words[3:])
    return {name: int(size) for name, _, size in pairs if size.isdigit()}


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


def _as_slurm_tells(found: Finding, state: str, run: Path, stage: str, life: int, job: str) -> Finding:
    """The same warning has several senders, and Slurm knows which it was. What it does not say stays as it is."""
    told = diagnose.ACCOUNTED.get(state.split(" ")[0])
    if told in policy.FOREIGN:
        return Finding(told, found.line)
    known = dict(word.partition("=")[::2] for word in _ask("scontrol", "show", "job", "-o", job).split())
    if known.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
        return Finding("preemption", found.line)
    ends = known.get("EndTime", "")
    if not ends.isdigit():  # The controller does not answer: by what was planned.
        ends = str(_start(run, stage, life) + _planned_s(run, stage)) if found.cause == "time limit" else ""
    if not ends:
        return found
    near = int(ends) - time.time() < NEAR_LIMIT_S
    return Finding("time limit" if near else "by hand", found.line)


def _accounted(run: Path, stage: str, life: int, job: str) -> str:
    """Slurm's state of this life of the job; empty where accounting has no answer."""
    return _of_life(run, stage, life, job, "State")


def _of_life(run: Path, stage: str, life: int, job: str, field: str) -> str:
    """A field of accounting's row of this life of the job."""
    began, rows = _start(run, stage, life), []
    for line in _ask("sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", f"Start,{field}").splitlines():
        start, _, value = line.partition("|")
        if start.isdigit() and int(start) <= began + CLOCKS_S:
            rows.append((int(start), value.strip()))
    return max(rows)[1] if rows else ""


def _start(run: Path, stage: str, life: int) -> int:
    """When the life began, in seconds since 1970; 0 where it was killed while it wrote that down."""
    words = (run / "lives" / f"{stage}-{life}").read_text(encoding="utf-8").split()
    return int(words[2]) if len(words) > 2 else 0


def _planned_s(run: Path, stage: str) -> int:
    return 60 * int(json.loads((run / "plan.json").read_text(encoding="utf-8"))["stages"][stage]["time_min"])


def _ask(*command: str) -> str:
    """A Slurm command's answer, times in seconds since 1970; empty without one."""
    try:
        said = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=said)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main(words: list[str]) -> None:
    """The command line that the shell calls."""
    what, run, stage, life = words[0], Path(words[1]), words[2], int(words[3])
    if what == "earlier":
        earlier(run, stage, life, f"{stage}-{life}-prologue")
    else:
        code, job, log = words[4:7]
        print(end(run, stage, life, int(code), job, Path(log)).line())


if __name__ == "__main__":
    main(sys.argv[1:])
