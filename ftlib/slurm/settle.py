"""Settle how a life of a stage ended, on the host: what the epilogue asks, and the next life's prologue.

    python -m ftlib.slurm.settle end RUN STAGE LIFE CODE JOB LOG     after srun; prints what the shell does:
        requeue BACKOFF_S NODE_TO_EXCLUDE|- MEM_MIB|- WORDS
        leave EXIT_CODE WORDS      it would be requeued, but this site forbids it: the guard queues it anew
        stop EXIT_CODE WORDS
    python -m ftlib.slurm.settle earlier RUN STAGE LIFE JOB          before srun: lives that no epilogue saw the end of;
        exit code 3 where the job was cancelled by its owner and must not begin again

Standard library only: the host of a container may have nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlib import atomic, events
from ftlib import outcome as outcomes
from ftlib.errors import Unavailable
from ftlib.outcome import Outcome
from ftlib.slurm import client, diagnose, policy
from ftlib.slurm.diagnose import Finding
from ftlib.slurm.policy import KINDS

ADJUSTMENTS = "adjustments.json"
EXCLUSION_H = 24
# Slurm warns up to a minute before the lead that was asked for, which is two minutes at most.
NEAR_LIMIT_S = 210
# Accounting writes a second or two after the fact, with the controller's clock.
CLOCKS_S = 2
# The exit code of what SIGKILL ended, as a shell says it.
KILLED = 137
# What `earlier` tells the prologue of a job that was cancelled.
CANCELLED = 3


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


def log_starts(words: list[str]) -> dict[str, int]:
    """Where a life's part of each rank's appended log begins, from its file's words: the prologue wrote name:bytes."""
    pairs = (word.rpartition(":") for word in words[3:])
    return {name: int(size) for name, _, size in pairs if size.isdigit()}


class _Life:
    """One life of a stage: what its files say, and Slurm's accounting."""

    def __init__(self, run: Path, stage: str, number: int, job: str = "") -> None:
        words = (run / "lives" / f"{stage}-{number}").read_text(encoding="utf-8").split()
        self.run, self.stage, self.number, self.job = run, stage, number, job or words[0]
        # In seconds since 1970; 0 where it was killed while it wrote that down.
        self.began = int(words[2]) if len(words) > 2 else 0
        self.log_starts = log_starts(words)

    def outcome(self) -> Outcome | None:
        ends = outcomes.read(self.run / "outcomes", self.stage)
        return next((end for end in ends if end.life == self.number), None)

    def logs(self, folder: Path) -> dict[int, str]:
        """The end of what each rank wrote in this life; the first one's also has srun's and the shell's words."""
        found = {}
        for path in folder.glob(f"{self.job}_*_log.out"):
            rank = path.name.removeprefix(f"{self.job}_").removesuffix("_log.out")
            if rank.isdigit():
                found[int(rank)] = diagnose.tail(path, start=self.log_starts.get(path.name, 0))
        return dict(sorted(found.items()))

    def accounted(self, field: str = "State") -> str:
        """A field of accounting's row of this life of the job; empty where accounting has no answer."""
        rows = []
        for line in _ask("sacct", "-X", "-D", "-n", "-P", "-j", self.job, "-o", f"Start,{field}").splitlines():
            start, _, value = line.partition("|")
            if start.isdigit() and int(start) <= self.began + CLOCKS_S:
                rows.append((int(start), value.strip()))
        return max(rows)[1] if rows else ""

    def found(self, code: int, outcome: Outcome | None, logs: dict[int, str], state: str) -> Finding:
        code, words = (outcome.code, outcome.words) if outcome else (code, None)
        return diagnose.life_cause(code=code, outcome=words, log="\n".join(logs.values()), accounted=state)

    def as_slurm_tells(self, found: Finding, state: str) -> Finding:
        """The same warning has several senders, and Slurm knows which it was. What it does not say stays as it is."""
        if told := _accounted_sender(state):
            return Finding(told, found.line)
        known = dict(word.partition("=")[::2] for word in _ask("scontrol", "show", "job", "-o", self.job).split())
        if known.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
            return Finding("preemption", found.line)
        ends = known.get("EndTime", "")
        if not ends.isdigit():  # The controller does not answer: by what was planned.
            if found.cause != "time limit":
                return found
            # A job that stages share says itself when it ends.
            planned_end = self.began + 60 * _read(self.run, "plan.json")["stages"][self.stage]["time_min"]
            ends = os.environ.get("FT_ENDS") or planned_end
        near = int(ends) - time.time() < NEAR_LIMIT_S
        return Finding("time limit" if near else "by hand", found.line)


def _accounted_sender(state: str) -> diagnose.Cause | None:
    """Who sent a life its warning, where accounting's state of it tells."""
    told = diagnose.ACCOUNTED.get(state.split(" ")[0])
    return told if told and KINDS[told].foreign else None


def end(run: Path, stage: str, life: int, code: int, job: str, log: Path) -> Verdict:
    """Decide about the life that has just ended, and record it."""
    it, in_slurm = _Life(run, stage, life, job), "SLURM_JOB_ID" in os.environ
    outcome, logs, state = it.outcome(), it.logs(log.parent), it.accounted() if in_slurm else ""
    found = it.found(code, outcome, logs, state)
    if cancelled_by_owner(run, stage, it.job):
        found = Finding("cancelled", found.line)
    elif found.cause in ("preemption", "time limit") and in_slurm:
        found = it.as_slurm_tells(found, state)
    lives = [*settled_lives(run, stage, life), policy.Life(found.cause, _progressed(run, stage, life))]
    adjusted = _read(run, ADJUSTMENTS)
    rows = adjusted.get("micro_batch") or _read(run, "plan.json").get("micro_batch")
    decision = policy.decide(lives, micro_batch=rows if stage == "train" else None)
    node, memory = "-", "-"
    if decision.requeue:
        if decision.halve_micro_batch:
            _halve(run, adjusted, found.line)
        if decision.exclude_node:
            node = _node_of(next((rank for rank, text in logs.items() if found.line and found.line in text), 0))
            _exclude(run, adjusted, node, found.line)
            # Slurm sets the whole list: the owner's nodes and those of earlier attempts would be in it no more.
            owner = _read(run, "provenance.json").get("profile", {}).get("exclude")
            node = ",".join(dict.fromkeys([*filter(None, [owner]), *excluded_nodes(run)]))
        asked = os.environ.get("SLURM_MEM_PER_NODE", "")
        if decision.memory_factor != 1 and asked.isdigit():
            grown = int(int(asked) * decision.memory_factor)
            # A request beyond what a node has would wait in the queue forever.
            memory = str(max(int(asked), min(grown, _node_mib(run, stage) or grown)))
    may_requeue = os.environ.get("FT_REQUEUE", "1") == "1"
    event: events.Name = "failed" if not decision.requeue else "requeued" if may_requeue else "interrupted"
    events.append(
        run / "events", f"{stage}-{life}-epilogue", event, stage=stage, life=life, job_id=job, code=code,
        cause=found.cause, line=found.line, words=decision.words, node=os.uname().nodename,
    )  # fmt: skip
    if decision.requeue:
        return Verdict("requeue" if may_requeue else "leave", 75, decision.words, decision.backoff_s, node, memory)
    return Verdict("stop", outcome.code if outcome and outcome.code not in (0, 75) else (code or 1), decision.words)


def earlier(run: Path, stage: str, life: int, writer: str) -> None:
    """Record the cause of every life before `life` whose end no epilogue saw: node or batch shell were lost."""
    settled = {event["life"] for event in events.read(run / "events") if _settles(event, stage)}
    for number in sorted(set(range(1, life)) - settled):
        it = _Life(run, stage, number)
        state = it.accounted()
        found = it.found(KILLED, it.outcome(), it.logs(run / "slurm" / stage), state)
        cause = found.cause
        if cause in ("preemption", "time limit"):
            cause = _accounted_sender(state) or cause
        words = f"{KINDS[cause].plain} (Slurm says {state or 'nothing'})"
        if cause == "killed" and not state:
            cause, words = "node failure", "its node or its batch shell was lost"
        if cause == "preemption" and state.startswith("FAILED"):
            # No epilogue ran and Slurm took nothing back: the batch shell was killed, and slurmd's SIGTERM followed.
            cause, words = "killed", "the batch shell was killed, and nothing says by whom; the work was saved"
        ended = it.accounted("End")
        events.append(
            run / "events", writer, "interrupted", stage=stage, life=number, job_id=it.job, cause=cause,
            line=found.line, words=words, settled_by=writer, **({"ended": int(ended)} if ended.isdigit() else {}),
        )  # fmt: skip


def cancelled_by_owner(run: Path, stage: str, job: str) -> bool:
    """Whether `make cancel` has ended the stage's job. A requeue that crosses it may start that job once more."""
    return any(
        event["event"] == "cancelled" and event.get("stage") == stage and str(event.get("job_id")) == job
        for event in events.read(run / "events")
    )


def _read(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of the run folder; empty where it is not there."""
    try:
        value: dict[str, Any] = json.loads((run / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


def excluded_nodes(run: Path, now: float | None = None) -> list[str]:
    """Nodes that were bad within the last day."""
    moment = time.time() if now is None else now
    return sorted(node for node, until in _read(run, ADJUSTMENTS).get("exclude", {}).items() if until > moment)


def _settles(event: dict[str, Any], stage: str) -> bool:
    return event.get("stage") == stage and (
        str(event["writer"]).endswith("-epilogue") or (event["event"] == "interrupted" and "settled_by" in event)
    )


def settled_lives(run: Path, stage: str, life: int) -> list[policy.Life]:
    """Why the stage's lives before `life` ended, since a person last submitted or resumed it; oldest first."""
    known: dict[int, diagnose.Cause] = {}
    first = 1
    for event in events.read(run / "events"):
        if event["event"] == "submitted" and event.get("stage") == stage and not event.get("automatic"):
            first = int(event.get("after_life", 0)) + 1
        elif _settles(event, stage) and event.get("cause") in KINDS:
            known[int(event["life"])] = event["cause"]
    return [policy.Life(known[n], _progressed(run, stage, n)) for n in range(first, life) if n in known]


def _progressed(run: Path, stage: str, life: int) -> bool:
    """Whether the life committed a checkpoint of a step that no earlier life had reached, or any piece of its work."""
    log = [event for event in events.read(run / "events") if event.get("stage") == stage]
    if any(event["event"] == "progress" and int(event["life"]) == life for event in log):
        return True
    saves = [(int(event["life"]), int(event["step"])) for event in log if event["event"] == "checkpoint"]
    before = max((step for number, step in saves if number < life), default=0)
    return any(step > before for number, step in saves if number == life)


def _node_mib(run: Path, stage: str) -> int | None:
    """Memory of a node of the stage's partition, in MiB, as the run's profile says it; None where it does not."""
    partition = _read(run, "plan.json").get("stages", {}).get(stage, {}).get("partition")
    for known in _read(run, "provenance.json").get("profile", {}).get("partitions", ()):
        if known["name"] == partition:
            return int(1024 * known["mem_gib_per_node"])
    return None


def _node_of(rank: int) -> str:
    """The node on which a rank ran; this one, which runs rank 0, where that cannot be known."""
    here = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    nodes = _ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", here)).split() if rank else []
    each = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return nodes[rank // int(each)] if each.isdigit() and rank // int(each) < len(nodes) else here


def _halve(run: Path, adjusted: dict[str, Any], why: str) -> None:
    plan = _read(run, "plan.json")
    rows = adjusted.get("micro_batch") or plan["micro_batch"]
    whole = plan["micro_batch"] * plan["accumulation"]
    smaller = next(size for size in range(rows // 2, 0, -1) if whole % size == 0)
    changes = {"micro_batch": smaller, "accumulation": whole // smaller}
    _adjust(run, adjusted, f"micro-batch {rows} -> {smaller}: {why}", changes)


def _exclude(run: Path, adjusted: dict[str, Any], node: str, why: str) -> None:
    nodes = {**adjusted.get("exclude", {}), node: time.time() + EXCLUSION_H * 3600}
    _adjust(run, adjusted, f"node {node} is left out for {EXCLUSION_H} h: {why}", {"exclude": nodes})


def _adjust(run: Path, adjusted: dict[str, Any], note: str, changes: dict[str, Any]) -> None:
    notes = [*adjusted.get("notes", []), note]
    atomic.write_json(run / ADJUSTMENTS, {**adjusted, **changes, "notes": notes})


def _ask(*command: str) -> str:
    """A Slurm command's answer; empty without one."""
    try:
        return client.call(*command, timeout_s=30)
    except Unavailable:
        return ""


def main(words: list[str]) -> None:
    """The command line that the shell calls."""
    what, run, stage, life = words[0], Path(words[1]), words[2], int(words[3])
    if what == "earlier":
        earlier(run, stage, life, f"{stage}-{life}-prologue")
        if cancelled_by_owner(run, stage, job=words[4]):
            print("ftlib: its owner has cancelled this job: it does not begin again")
            sys.exit(CANCELLED)
    else:
        code, job, log = words[4:7]
        print(end(run, stage, life, int(code), job, Path(log)).line())


if __name__ == "__main__":
    main(sys.argv[1:])
