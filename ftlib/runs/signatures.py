"""What the log of an attempt tells about its end: Slurm's own notices, srun's report of each rank, known error texts.

Pure functions over text. "The first log" is rank 0's: the batch shell, srun and every node's slurmstepd write there,
too. An attempt's part of a log begins where its prologue found the file's end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Cause = Literal[
    "preemption", "time limit", "by hand", "idle GPU", "node failure", "host memory", "GPU memory", "bad GPU",
    "collective", "disk full", "input", "code", "container", "transient", "killed", "cancelled", "unknown",
]  # fmt: skip


# Slurm's records are written a second or two after the fact, with the controller's clock.
CLOCKS_S = 2


@dataclass(frozen=True)
class Finding:
    """Why an attempt ended."""

    cause: Cause
    line: str = ""  # the line of a log, or of an outcome, that shows it; empty where something else does
    message: str = ""  # what the cause was seen from, for a person
    rank: int | None = None  # the rank whose log shows it; None where no log does


@dataclass(frozen=True)
class RankEnd:
    """srun's report that one rank ended with an error."""

    rank: int
    how: str  # such as "Killed" or "Exited with exit code 1"
    line: str

    @property
    def saved(self) -> bool:
        """Whether the rank ended itself after a save."""
        return self.how.startswith("Exited with exit code 75")

    @property
    def signal(self) -> str:
        """The signal that ended it, as srun calls it ("Killed", "Terminated"…); empty where it exited."""
        return "" if self.how.startswith(("Exited", "Out Of Memory")) else self.how


# Within one rank's log the first that matches decides, so the special stand before the general. Each was taken from a
# real log.
SIGNATURES: dict[Cause, tuple[str, ...]] = {
    "host memory": (
        r"oom[_-]kill event|oom-kill|Out Of Memory",
        r"exceeded memory limit \(|Exceeded \w+ memory limit",
        r"Killed process \d+ .*anon-rss",
        r"DefaultCPUAllocator: can't allocate memory",
        r"^MemoryError",
    ),
    "bad GPU": (
        r"NVRM: Xid|GPU has fallen off the bus|ERROR_LOST",
        r"[Uu]ncorrectable ECC error",
        r"CUDA error: (?:uncorrectable|hardware stack error|unknown error)",
        r"CUDA-capable device(?:s|\(s\)) (?:are|is/are) busy or unavailable",
    ),
    "GPU memory": (r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",),
    "disk full": (r"No space left on device|Disk quota exceeded", r"\[Errno (?:28|122)\]"),
    "collective": (
        r"Watchdog caught collective operation timeout",
        r"nccl(?:System|Remote|Internal)Error|NCCL (?:WARN|error)",
        r"gloo/transport|Connection closed by peer|connectFullMesh failed|gloo.*[Tt]imed out",
        r"DistNetworkError|DistStoreError|Socket Timeout",
        r"EADDRINUSE|Address already in use",
        # Ours, before the model loads.
        r"did not arrive within|did not open port|but cannot talk|the processes cannot meet",
    ),
    "transient": (
        r"Stale file handle|Input/output error|Transport endpoint is not connected",
        r"\[Errno (?:5|116)\]",
        r"Connection reset by peer|Temporary failure in name resolution|Read timed out|Service Unavailable",
    ),
    "container": (r"Failed to create user namespace", r"^(?:\x1b\[\d+m)?FATAL:\s"),
    "code": (
        r"^(?:ModuleNotFound|Import|Syntax|Name|Attribute|Type|Assertion|Key|Index|Value|NotImplemented|Runtime)Error\b",
    ),
}
_COMPILED = {cause: re.compile("|".join(patterns), re.MULTILINE) for cause, patterns in SIGNATURES.items()}
# A fault of one rank's own, which makes the other ranks lose touch with it. "transient" and "code" are such faults
# only in the log of the rank that ended first: elsewhere they may be what a lost connection looks like.
_OWN_FAULTS: tuple[Cause, ...] = ("host memory", "bad GPU", "GPU memory", "disk full", "container")
# The peer was gone; a time-out would say that it was silent.
_PEER_GONE = re.compile(r"[Cc]losed by peer|reset by peer|remote process exited|Broken pipe")
# Slurm kills what uses more memory than was requested, and some sites' accounting calls that job CANCELLED.
OVER_MEMORY = re.compile(r"^.*(?:exceeded memory limit \(|Exceeded \w+ memory limit).*$", re.MULTILINE)

# slurmstepd's notices, from 22.05 and 26.05. A job that is cancelled has none of the reasons, and its notice names
# the JOB: of a preemption with grace, or where srun ends the other ranks, it names a STEP alone.
_NOTICES: dict[Cause, str] = {
    "node failure": r"srun: error: Node failure on|\*\*\* (?:JOB|STEP) .* DUE TO NODE FAILURE",
    "preemption": r"\*\*\* (?:JOB|STEP) .* DUE TO PREEMPTION",
    "time limit": r"\*\*\* (?:JOB|STEP) .* DUE TO TIME LIMIT",
    "by hand": r"\*\*\* (?:JOB|STEP) .* DUE TO JOB REQUEUE",
    "cancelled": r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL (?:Terminated|Killed) )?\*\*\*",
}
_NOTICE_TIME = re.compile(r" AT (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")
_NOTICE = {cause: re.compile(pattern) for cause, pattern in _NOTICES.items()}
# The job failed while its step ran: the batch shell was killed.
_SHELL_LOST = re.compile(r"^.*\*\*\* STEP .* FAILED \(non-zero exit code or other failure mode\).*$", re.MULTILINE)
# The epilogue's, where it could not ask for the cause. What requeues the job after that is the epilogue itself.
_UNSETTLED = "ftlib: the cause of this end could not be settled"
# Written by the prologue's watch: the task then got SIGTERM from us, whoever killed its slurmstepd.
_STEP_LOST = re.compile(r"^ftlib: the step's slurmstepd is gone.*$", re.MULTILINE)
# bash's, of a job's script.
_SRUN_KILLED = re.compile(r"^\S+: line \d+: +\d+ Killed +srun\b.*$", re.MULTILINE)
_RANKS_ENDED = re.compile(r"^srun: error: \S+: tasks? ([\d,\[\]-]+): (.*)$", re.MULTILINE)


def line_at(text: str, start: int, end: int) -> str:
    """The line of `text` around the characters from `start` to `end`, at most 300 characters of it."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", end)
    return text[first : last if last >= 0 else None].strip()[:300]


def from_log(text: str) -> Finding | None:
    """The first known signature in one rank's log; None without one."""
    for cause, pattern in _COMPILED.items():
        if match := pattern.search(text):
            return Finding(cause, line_at(text, match.start(), match.end()))
    return None


def rank_ends(text: str) -> list[RankEnd]:
    """srun's reports of ranks that ended with an error, in its order."""
    ends = []
    for match in _RANKS_ENDED.finditer(text):
        for part in match[1].strip("[]").split(","):
            low, _, high = part.partition("-")
            ends += [RankEnd(rank, match[2], match[0].strip()) for rank in range(int(low), int(high or low) + 1)]
    return ends


def notice(text: str, since: float | None) -> Finding | None:
    """Why Slurm itself ended the job, by the first notice that says so; None without one.

    since: when the attempt began, in seconds since 1970. An earlier notice is about an earlier attempt, whose
    slurmstepd was late; where it is not known, no notice with a time counts.
    """
    matches = [(match.start(), cause, match) for cause, pattern in _NOTICE.items() for match in pattern.finditer(text)]
    for start, cause, match in sorted(matches, key=lambda found: found[0]):
        by_epilogue = cause == "by hand" and _UNSETTLED in text[:start]
        if not by_epilogue and _written_since(match[0], since):
            line = line_at(text, match.start(), match.end())
            return Finding(cause, line, f"Slurm wrote: {line}")
    return None


def _written_since(notice_text: str, since: float | None) -> bool:
    moment = _NOTICE_TIME.search(notice_text)
    if moment is None:
        return "***" not in notice_text  # srun's own notices have no time; it belongs to the attempt
    written = time.mktime(time.strptime(moment[1], "%Y-%m-%dT%H:%M:%S"))  # the node's local time
    return since is not None and written >= since - CLOCKS_S


def step_lost(text: str) -> Finding | None:
    """The step's slurmstepd on the batch host was killed. Where srun had reported a rank's end before, that was the
    cause, and the step came down after it."""
    lost = _STEP_LOST.search(text)
    if lost is None or _RANKS_ENDED.search(text, 0, lost.start()):
        return None
    return Finding("killed", lost[0], "the step's slurmstepd was killed")


def srun_killed(text: str) -> Finding | None:
    """srun itself was killed, and no rank had ended with an error before."""
    killed = _SRUN_KILLED.search(text)
    if killed is None or _RANKS_ENDED.search(text) or _STEP_LOST.search(text):
        return None
    return Finding("killed", killed[0][:300], "srun was killed")


def shell_lost(text: str) -> str:
    """slurmstepd's line about a step that outlived its batch shell; empty without one."""
    match = _SHELL_LOST.search(text)
    return match[0].strip() if match else ""


def requeued_by_epilogue(text: str) -> bool:
    """Whether it was the epilogue that requeued the job, without knowing the cause."""
    return _UNSETTLED in text


def of_ranks(logs: Mapping[int, str], ranks: int | None) -> Finding | None:
    """Why an attempt failed by its own doing, from what its ranks wrote; None where that cannot be told.

    logs: the logs that could be read, by rank. ranks: how many there are; None where that is not known.

    One rank's fault brings the next: its peers complain of lost connections. So a rank's own fault decides, and
    "collective" is the cause only where every rank is known to have been alive when the first one complained.
    """
    findings = {rank: finding for rank, text in sorted(logs.items()) if (finding := from_log(text))}
    faults = [rank for rank, finding in findings.items() if finding.cause in _OWN_FAULTS]
    if faults:
        return _at(findings, min(faults, key=lambda rank: list(SIGNATURES).index(findings[rank].cause)))
    ends = rank_ends(logs.get(0, ""))
    first = ends[0] if ends else None
    if first and first.signal == "Killed":
        return Finding("killed", first.line, "srun reports it", first.rank)
    all_ranks = _all_ranks(logs, ends, ranks)
    if len(all_ranks) > 1 and first is None and not all_ranks <= set(logs):
        return None  # the rank that failed may be the one that is missing
    others = [rank for rank, finding in findings.items() if finding.cause != "collective"]
    if first and first.rank in others:
        return _at(findings, first.rank)
    if others:
        # It ended after the first, which shows nothing of its own, or no fault but a lost connection.
        slower = first is None or (first.rank in findings and findings[others[0]].cause == "code")
        return _at(findings, others[0]) if slower else None
    if not findings or missing_ranks(logs, ranks):
        return None
    return _at(findings, first.rank if first and first.rank in findings else min(findings))


def missing_ranks(logs: Mapping[int, str], ranks: int | None) -> list[int]:
    """Ranks that may have been gone before the others lost touch with them: neither do they complain of that
    themselves, nor did srun have to end them."""
    ends = rank_ends(logs.get(0, ""))
    findings = {rank: from_log(text) for rank, text in logs.items()}
    complaining = {rank for rank, finding in findings.items() if finding and finding.cause == "collective"}
    gone = any(_PEER_GONE.search(finding.line) for finding in findings.values() if finding)
    ended_by_srun = {end.rank for end in ends[1:] if end.signal in ("Killed", "Terminated") and not gone}
    return sorted(_all_ranks(logs, ends, ranks) - complaining - ended_by_srun)


def _all_ranks(logs: Mapping[int, str], ends: Collection[RankEnd], ranks: int | None) -> set[int]:
    return set(range(ranks)) if ranks else {*logs, *(end.rank for end in ends)}


def _at(findings: Mapping[int, Finding], rank: int) -> Finding:
    finding = findings[rank]
    return Finding(finding.cause, finding.line, finding.message or f"the log of rank {rank} shows it", rank)
