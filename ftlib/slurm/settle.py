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
from ftlib.runs.diagnosis import cause_of
from ftlib.runs.events import Cancelled, Decided, Override, Settled, Settler, Submitted
from ftlib.runs.ledger import Ledger
from ftlib.runs.overrides import EXCLUDE, MICRO_BATCH
from ftlib.runs.policy import KINDS
from ftlib.slurm import client, evidence

EXCLUSION_H = 24
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


def end(run: Path, stage: str, life: int, code: int, job: str, log: Path) -> Verdict:
    """Decide about the life that has just ended, and record it."""
    known, in_slurm = ledger.read(run), "SLURM_JOB_ID" in os.environ
    seen = evidence.gather(
        run, known, stage, life, exit_code=code, epilogue=True, slurm=in_slurm, job_id=job, log_folder=log.parent
    )  # fmt: skip
    found = cause_of(seen)
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
            bad = _node_of(found.rank or 0)
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
    verdict = _verdict(decision, seen.outcome_code, code, exclude=node, mem_mib=memory)
    settled = Settled(
        stage=stage, attempt=life, job_id=job, cause=found.cause, by="epilogue", line=found.line, code=code,
        message=f"{KINDS[found.cause].plain} ({found.message})", node=_node_of(found.rank or 0), rank=found.rank,
    )  # fmt: skip
    decided = Decided(
        stage=stage, choice=verdict.do, job_id=job, attempt=life, cause=found.cause, message=decision.words,
        code=verdict.code,
    )  # fmt: skip
    events.append(run / "events", f"{stage}-{life}-epilogue", *changes, settled, decided)
    return verdict


def _verdict(decision: policy.Decision, stated: int | None, code: int, *, exclude: str, mem_mib: str) -> Verdict:
    """What the epilogue does. stated: the outcome's code, None without one. code: what srun returned."""
    if decision.requeue:
        may_requeue = os.environ.get("FT_REQUEUE", "1") == "1"
        return Verdict("requeue" if may_requeue else "leave", 75, decision.words, decision.backoff_s, exclude, mem_mib)
    own_code = stated if stated not in (None, 0, 75) else (code or 1)
    return Verdict("stop", own_code, decision.words)


def earlier(run: Path, stage: str, life: int, writer: str, *, by: Settler) -> None:
    """Record the cause of every life before `life` whose end no epilogue saw: node or batch shell were lost."""
    known = ledger.read(run)
    for number in sorted(set(range(1, life)) - known.settled(stage).keys()):
        seen = evidence.gather(run, known, stage, number)
        found = cause_of(seen)
        settled = Settled(
            stage=stage, attempt=number, job_id=known.attempt(stage, number).job_id, cause=found.cause, by=by,
            message=f"{KINDS[found.cause].plain} ({found.message})", line=found.line, rank=found.rank,
            ended=seen.ended,
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
