"""What Slurm says of our jobs now: one squeue and at most one sacct, kept as long as the site wants us to wait; and why
a job waits, in words."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from ftlib import atomic
from ftlib.errors import Unavailable
from ftlib.runs.scheduler import Accounting, SchedulerView
from ftlib.slurm import client
from ftlib.slurm.client import Job

# Accounting's last word: such a job is not asked about again.
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
# A controller that was killed before it had a job on disk has lost it, and accounting never hears of its end.
BEGUN = ("PENDING", "RUNNING", "SUSPENDED")
# Our own word for a job of which nothing could be heard.
UNKNOWN = "UNKNOWN"


class Answer(NamedTuple):
    """What Slurm said: job id -> Job; when; what keeps it from answering now; and whether accounting was heard.

    A job's state is "" where Slurm does not know it any more, and UNKNOWN where that could not be learned: squeue or,
    for a job that squeue does not list, accounting failed. With accounting disabled a job that squeue does not list has
    ended, and only the run folder can tell how.
    """

    jobs: dict[str, Job]
    asked: float = 0.0  # seconds since 1970
    trouble: str = ""
    accounting: Accounting = "answered"

    def unknown(self, wanted: Iterable[str]) -> list[str]:
        """Those of the jobs `wanted` of which nothing could be learned."""
        return [job for job in wanted if self.jobs.get(job, Job("")).state == UNKNOWN]

    def view(self) -> SchedulerView:
        """What the reducer needs of it."""
        known = {job: one for job, one in self.jobs.items() if one.state not in ("", UNKNOWN)}
        unknown = any(job.state == UNKNOWN for job in self.jobs.values())
        queue_silent = bool(self.trouble) and self.accounting != "failed"
        return SchedulerView(jobs=known, answered=not (queue_silent or unknown), accounting=self.accounting)


def ask(
    wanted: Collection[str], *, users: Collection[str] = (), kept: Path | None = None, least_s: float = 0.0
) -> Answer:
    """What Slurm knows of the jobs `wanted`, which belong to `users` (to me without any).

    kept: file of the last answer, which stands for `least_s` if it knows all that is wanted. Where squeue does not
    answer, the last answer and the trouble are returned; Unavailable without `kept`. Where accounting alone does not,
    that is the trouble, and what squeue said counts.
    """
    old, now = _read(kept), time.time()
    if 0 <= now - old.asked < least_s and all(job in old.jobs for job in wanted):
        return old
    try:
        listed = client.jobs(users)
    except Unavailable as error:
        if kept is None:
            raise
        return old._replace(jobs={job: old.jobs.get(job, Job(UNKNOWN)) for job in wanted}, trouble=str(error))
    final = {number: job for number, job in old.jobs.items() if job.state in FINAL}
    answer = combine(wanted, final | {job.id: job for job in listed}, now)
    if kept is not None:
        with contextlib.suppress(OSError):  # another's folder: then it is asked each time
            rows = [[number, *job] for number, job in answer.jobs.items()]
            atomic.write_text(kept, json.dumps({**answer._asdict(), "jobs": rows}))
    return answer


def combine(wanted: Collection[str], listed: dict[str, Job], now: float) -> Answer:
    """`listed` (what squeue told, by job id) completed by what accounting tells of the other jobs `wanted`."""
    missing = [job for job in wanted if job not in listed]
    accounting: Accounting = "answered"
    state_of_others, trouble, told = "", "", list[Job]()
    try:
        told = client.accounted(missing)
    except client.AccountingDisabled:
        accounting = "disabled"
    except Unavailable as error:
        state_of_others, trouble, accounting = UNKNOWN, str(error), "failed"
    ended = {job.id: job for job in told if job.state not in BEGUN}
    others = {job: Job(state_of_others) for job in missing}
    return Answer(others | listed | ended, asked=now, trouble=trouble, accounting=accounting)


def _read(kept: Path | None) -> Answer:
    try:
        if kept is None:
            return Answer({})
        value = json.loads(kept.read_text(encoding="utf-8"))
        return Answer(**{**value, "jobs": {number: Job(*fields) for number, *fields in value["jobs"]}})
    except (OSError, ValueError, TypeError, KeyError):  # an earlier version's file, too
        return Answer({})


# squeue(1), "JOB REASON CODES".
REASONS = {
    "None": "it was queued just now, and the scheduler has not looked at it yet",
    "Priority": "jobs of higher priority come first",
    "Resources": "it is next, and waits until enough of the nodes are free",
    "Dependency": "it waits for the stage before it",
    "DependencyNeverSatisfied": "the job that it waits for ended badly, so it will never start",
    "BeginTime": "Slurm lets a requeued job rest for a moment",
    "Cleaning": "its last life is still being cleaned up",
    "JobArrayTaskLimit": "as many tasks of its array are running as it allows",
    "JobHeldUser": "its owner holds it: scontrol release lets it go",
    "JobHeldAdmin": "an administrator holds it; ask the site",
    "JobHoldMaxRequeue": "Slurm holds it after too many requeues: scontrol release lets it go",
    "launch failed requeued held": "it could not be started on its node, and Slurm holds it: scontrol release",
    "ReqNodeNotAvail": "nodes that it needs are down, or reserved for maintenance",
    "NodeDown": "a node that it needs is down",
    "Reservation": "it waits for its reservation",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is closed for now",
    "PartitionTimeLimit": "its time limit is longer than its partition allows; it will never start",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows; it will never start",
    "PartitionConfig": "it asks for what its partition does not offer; it will never start",
    "BadConstraints": "no node has what it asks for; it will never start",
    "Licenses": "it waits for a licence",
    "InvalidAccount": "its account is not valid (any more)",
    "InvalidQOS": "its QOS is not valid (any more)",
    "AccountNotAllowed": "its account may not use its partition",
    "QOSNotAllowed": "its QOS may not be used with its account or partition",
    "MaxSubmitJobs": "too many of your jobs are in the queue",
}
LIMITED = {
    "gres": "GPUs", "cpu": "CPUs", "mem": "memory", "node": "nodes", "job": "jobs", "wall": "wall time",
    "billing": "billing units", "submit": "jobs in the queue",
}  # fmt: skip
_LIMIT = re.compile(r"(QOS|Assoc|)(Grp|Max)(\w+)")


def why_waits(job: Job, now: float) -> str:
    """Why a pending job waits, and when Slurm thinks it will start. Slurm's own word where we have none for it."""
    reason = job.reason.partition(",")[0].strip("()").replace("_", " ")
    words = REASONS.get(reason) or _limit(reason) or (f"Slurm says {job.reason}" if reason else "")
    ahead = float(job.start) - now if job.start.isdigit() and reason != "Dependency" else 0
    if ahead < 60:
        return words
    form = "%H:%M" if ahead < 12 * 3600 else "%a %H:%M" if ahead < 6 * 86400 else "%Y-%m-%d"
    return f"{words}; thought to start at {time.strftime(form, time.localtime(float(job.start)))}".removeprefix("; ")


def _limit(reason: str) -> str:
    """QOSGrpGRES, AssocMaxCpuPerJobLimit, QOSMaxJobsPerUserLimit, …"""
    if not (found := _LIMIT.fullmatch(reason)):
        return ""
    whose, kind, rest = found[1], found[2], found[3].lower()
    what = next((words for word, words in LIMITED.items() if word in rest.partition("per")[0]), "such jobs")
    each = next((words for word, words in (("peruser", " a user"), ("perjob", " a job")) if word in rest), "")
    holder = {"QOS": "its QOS", "Assoc": "its account", "": "the site"}[whose]
    return f"{holder} allows no more {what}{each}" + (" for the whole group now" if kind == "Grp" else "")
