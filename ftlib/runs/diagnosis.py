"""Why a life ended: from its outcome, its exit code, accounting and the log's known signatures.
Standard library only: it runs on the batch host, outside any container."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Cause = Literal[
    "preemption", "time limit", "by hand", "idle GPU", "node failure", "host memory", "GPU memory", "bad GPU",
    "collective", "disk full", "input", "code", "container", "transient", "killed", "cancelled",
]  # fmt: skip

# What is read of a log: its end, where the reason stands.
LOG_TAIL_BYTES = 64 * 1024

# The first that matches decides, so the special stand before the general. Each was taken from a real log.
SIGNATURES: dict[Cause, tuple[str, ...]] = {
    "node failure": (r"srun: error: Node failure on|DUE TO NODE FAILURE",),
    "host memory": (
        r"oom[_-]kill event|oom-kill|Out Of Memory",
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
# Said by the prologue's watch: the task then got SIGTERM from us, whoever killed its slurmstepd.
STEP_LOST = re.compile(r"^ftlib: the step's slurmstepd is gone.*$", re.MULTILINE)
# How our own errors say it; the libraries' words need not name the reason.
_NO_ROOM = re.compile(r"[Nn]o space left|quota exceeded|could not be written, with|free some space")
_RANK_ENDED = re.compile(r"^srun: error: \S+: tasks? [\d,\[\]-]+: (.*)$", re.MULTILINE)
# The warnings end a rank whose handler does not stand yet.
_ENDED_BY: dict[str, Cause] = {"Killed": "killed", "User defined signal 2": "time limit", "Terminated": "preemption"}
_COMPILED = {cause: re.compile("|".join(patterns), re.MULTILINE) for cause, patterns in SIGNATURES.items()}

# What Slurm's accounting says of a job whose epilogue did not run.
ACCOUNTED: dict[str, Cause] = {
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "PREEMPTED": "preemption",
    "TIMEOUT": "time limit",
    "DEADLINE": "time limit",
    "OUT_OF_MEMORY": "host memory",
    "CANCELLED": "cancelled",
    "REQUEUED": "by hand",
    # No epilogue saw it, so the batch shell itself was killed.
    "FAILED": "killed",
}

@dataclass(frozen=True)
class Finding:
    """A cause, and the log's line that shows it (empty where something else does)."""

    cause: Cause
    line: str


def from_outcome(code: int, words: str) -> Cause | None:
    """The cause an outcome states itself; None where it only says that something went wrong."""
    if code == 64:
        return "disk full" if _NO_ROOM.search(words) else "input"
    if code == 76:
        return "bad GPU"
    if code == 75:
        causes: tuple[Cause, ...] = ("time limit", "idle GPU")
        return next((cause for cause in causes if f"({cause})" in words), "preemption")
    return None


def from_log(text: str) -> Finding | None:
    """The first known signature; None without one."""
    for cause, pattern in _COMPILED.items():
        if cause == "collective" and (signalled := _first_rank_signalled(text)):
            return signalled
        if found := pattern.search(text):
            start = text.rfind("\n", 0, found.start()) + 1
            end = text.find("\n", found.end())
            return Finding(cause, text[start : end if end >= 0 else None].strip()[:300])
    return None


def _first_rank_signalled(text: str) -> Finding | None:
    """A rank that a signal ended takes the others with it, which then complain of a lost connection."""
    first = _RANK_ENDED.search(text)
    cause = next((cause for words, cause in _ENDED_BY.items() if first and first[1].startswith(words)), None)
    return Finding(cause, first[0].strip()) if first and cause else None


def life_cause(*, code: int, outcome: str | None, log: str, accounted: str = "") -> Finding:
    """Why a life ended.

    code: exit code srun returned, or the outcome's. outcome: the outcome's words, None without one. log: the end of
    this life's log. accounted: Slurm's state of the job, where it has one already.
    """
    # Where srun had heard of a rank's end before, that was the cause, and the step came down after it.
    if (lost := STEP_LOST.search(log)) and not _RANK_ENDED.search(log, 0, lost.start()):
        return Finding("killed", lost[0])
    if outcome is not None and (said := from_outcome(code, outcome)):
        return Finding(said, outcome)
    state = accounted.split(" ")[0]
    by_slurm = Finding(ACCOUNTED[state], f"Slurm says {accounted}") if state in ACCOUNTED else None
    # Where Slurm itself ended the life, what the log complains of came of that.
    if by_slurm and state != "FAILED":
        return by_slurm
    if shown := from_log(f"{log}\n{outcome or ''}"):
        return shown
    if by_slurm:
        return by_slurm
    if outcome is not None:
        return Finding("code", outcome)
    if code == 140:
        return Finding("time limit", "SIGUSR2 came before the handler stood")
    if code == 143:
        return Finding("preemption", "SIGTERM came before the handler stood")
    return Finding("killed", f"exit code {code}")


def tail(path: Path, start: int = 0) -> str:
    """The end of a log file from byte `start` on (earlier lives wrote what is before); empty without a file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
