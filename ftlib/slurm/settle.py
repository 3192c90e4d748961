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

from ftlib.errors import Unavailable
from ftlib.runs import diagnosis, events, ledger, policy
from ftlib.runs.diagnosis import Finding
from ftlib.runs.events import Cancelled, Decided, Override, Settled, Settler, Submitted
from ftlib.runs.ledger import Ledger
from ftlib.runs.outcome import Outcome
from ftlib.runs.overrides import EXCLUDE, MICRO_BATCH
from ftlib.runs.policy import KINDS
from ftlib.slurm import client

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


class _Life:
    """One life of a stage: what its files say, and Slurm's accounting."""

    def __init__(self, run: Path, known: Ledger, stage: str, number: int, job: str = "") -> None:
        attempt = known.attempt(stage, number)
        self.run, self.stage, self.number, self.job = run, stage, number, job or attempt.job_id
        self.began, self.log_starts = attempt.began, attempt.log_starts
        self.outcome = known.outcome(stage, number)

    def logs(self, folder: Path) -> dict[int, str]:
        """The end of what each rank wrote in this life; the first one's also has srun's and the shell's words."""
        found = {}
        for path in folder.glob(f"{self.job}_*_log.out"):
            rank = path.name.removeprefix(f"{self.job}_").removesuffix("_log.out")
            if rank.isdigit():
                found[int(rank)] = diagnosis.tail(path, start=self.log_starts.get(path.name, 0))
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
        code, words = (outcome.code, outcome.message) if outcome else (code, None)
        return diagnosis.life_cause(code=code, outcome=words, log="\n".join(logs.values()), accounted=state)

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


def _accounted_sender(state: str) -> diagnosis.Cause | None:
    """Who sent a life its warning, where accounting's state of it tells."""
    told = diagnosis.ACCOUNTED.get(state.split(" ")[0])
    return told if told and KINDS[told].foreign else None


def end(run: Path, stage: str, life: int, code: int, job: str, log: Path) -> Verdict:
    """Decide about the life that has just ended, and record it."""
    known, in_slurm = ledger.read(run), "SLURM_JOB_ID" in os.environ
    it = _Life(run, known, stage, life, job)
    outcome, logs, state = it.outcome, it.logs(log.parent), it.accounted() if in_slurm else ""
    found = it.found(code, outcome, logs, state)
    if cancelled_by_owner(known, stage, it.job):
        found = Finding("cancelled", found.line)
    elif found.cause in ("preemption", "time limit") and in_slurm:
        found = it.as_slurm_tells(found, state)
    lives = [*settled_lives(known, stage, life), policy.Life(found.cause, known.progressed(stage, life))]
    plan = _read(run, "plan.json")
    rows = known.overrides(time.time()).micro_batch or plan.get("micro_batch")
    decision = policy.decide(lives, micro_batch=rows if stage == "train" else None)
    changes: list[Override] = []
    node, memory = "-", "-"
    if decision.requeue:
        if decision.halve_micro_batch:
            changes.append(_halved(plan, rows, found.line))
        if decision.exclude_node:
            bad = _node_of(next((rank for rank, text in logs.items() if found.line and found.line in text), 0))
            changes.append(_excluded(bad, found.line))
            # Slurm sets the whole list: the owner's nodes and those of earlier attempts would be in it no more.
            owner = _read(run, "provenance.json").get("profile", {}).get("exclude")
            excluded = excluded_nodes(known.with_events(*changes))
            node = ",".join(dict.fromkeys([*filter(None, [owner]), *excluded]))
        asked = os.environ.get("SLURM_MEM_PER_NODE", "")
        if decision.memory_factor != 1 and asked.isdigit():
            grown = int(int(asked) * decision.memory_factor)
            # A request beyond what a node has would wait in the queue forever.
            memory = str(max(int(asked), min(grown, _node_mib(run, stage) or grown)))
    verdict = _verdict(decision, outcome, code, exclude=node, mem_mib=memory)
    settled = Settled(
        stage=stage, attempt=life, job_id=job, cause=found.cause, by="epilogue", message=KINDS[found.cause].plain,
        line=found.line, code=code, node=os.uname().nodename,
    )  # fmt: skip
    decided = Decided(
        stage=stage, choice=verdict.do, job_id=job, attempt=life, cause=found.cause, message=decision.words,
        code=verdict.code,
    )  # fmt: skip
    events.append(run / "events", f"{stage}-{life}-epilogue", *changes, settled, decided)
    return verdict


def _verdict(decision: policy.Decision, outcome: Outcome | None, code: int, *, exclude: str, mem_mib: str) -> Verdict:
    """What the epilogue does. code: what srun returned, or the outcome's."""
    if decision.requeue:
        may_requeue = os.environ.get("FT_REQUEUE", "1") == "1"
        return Verdict("requeue" if may_requeue else "leave", 75, decision.words, decision.backoff_s, exclude, mem_mib)
    return Verdict("stop", outcome.code if outcome and outcome.code not in (0, 75) else (code or 1), decision.words)


def earlier(run: Path, stage: str, life: int, writer: str, *, by: Settler) -> None:
    """Record the cause of every life before `life` whose end no epilogue saw: node or batch shell were lost."""
    known = ledger.read(run)
    for number in sorted(set(range(1, life)) - known.settled(stage).keys()):
        it = _Life(run, known, stage, number)
        state = it.accounted()
        found = it.found(KILLED, it.outcome, it.logs(run / "slurm" / stage), state)
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
        settled = Settled(
            stage=stage, attempt=number, job_id=it.job, cause=cause, by=by, message=words, line=found.line,
            ended=int(ended) if ended.isdigit() else None,
        )  # fmt: skip
        events.append(run / "events", writer, settled)


def cancelled_by_owner(known: Ledger, stage: str, job: str) -> bool:
    """Whether `make cancel` has ended the stage's job. A requeue that crosses it may start that job once more."""
    return any(event.job_id == job for event in known.of(Cancelled, stage))


def _read(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of the run folder; empty where it is not there."""
    try:
        value: dict[str, Any] = json.loads((run / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


def excluded_nodes(known: Ledger, now: float | None = None) -> list[str]:
    """Nodes that were bad within the last day."""
    return sorted(known.overrides(time.time() if now is None else now).excluded)


def settled_lives(known: Ledger, stage: str, life: int) -> list[policy.Life]:
    """Why the stage's lives before `life` ended, since a person last submitted or resumed it; oldest first."""
    by_person = [event for event in known.of(Submitted, stage) if not event.automatic]
    first = by_person[-1].after_attempt + 1 if by_person else 1
    causes: dict[int, diagnosis.Cause] = {
        attempt: settled.cause
        for attempt, settled in known.settled(stage).items()
        if settled.cause in KINDS
    }
    return [policy.Life(causes[n], known.progressed(stage, n)) for n in range(first, life) if n in causes]


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


def _halved(plan: dict[str, Any], rows: Any, why: str) -> Override:
    whole = plan["micro_batch"] * plan["accumulation"]
    smaller = next(size for size in range(rows // 2, 0, -1) if whole % size == 0)
    return Override(field=MICRO_BATCH, value=smaller, who="epilogue", why=why)


def _excluded(node: str, why: str) -> Override:
    until = time.time() + EXCLUSION_H * 3600
    return Override(field=EXCLUDE + node, value=True, who="epilogue", why=why, until=until)


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
        earlier(run, stage, life, f"{stage}-{life}-prologue", by="prologue")
        if cancelled_by_owner(ledger.read(run), stage, job=words[4]):
            print("ftlib: its owner has cancelled this job: it does not begin again")
            sys.exit(CANCELLED)
    else:
        code, job, log = words[4:7]
        print(end(run, stage, life, int(code), job, Path(log)).line())


if __name__ == "__main__":
    main(sys.argv[1:])
