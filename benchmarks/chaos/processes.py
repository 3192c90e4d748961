"""The processes of a stage's job, found in /proc: workers, srun, slurmstepd, the batch shell."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Worker:
    """One rank of a stage."""

    pid: int
    rank: int
    life: int
    node: str


def _stat(pid: int) -> tuple[str, str, int] | None:
    """(name, state letter, parent)."""
    try:
        name, _, rest = (PROC / str(pid) / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return None
    words = rest.split()
    return name, words[0], int(words[1])


def _all() -> list[tuple[int, str, str, int]]:
    found = []
    for entry in os.listdir(PROC):
        if entry.isdigit() and (stat := _stat(int(entry))):
            found.append((int(entry), *stat))
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        text = (PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)


def _command(pid: int) -> str:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def workers(run: Path, stage: str, life: int) -> list[Worker]:
    """The ranks of a stage's life that live now, in order of rank."""
    found = []
    for pid, name, state, _ in _all():
        if not name.startswith("python") or state == "Z":
            continue
        said = _environment(pid)
        if said.get("FT_RUN") != str(run) or said.get("FT_STAGE") != stage or said.get("FT_LIFE") != str(life):
            continue
        if "SLURM_PROCID" in said and "jobs.stage" in _command(pid) and _is_task(pid):
            found.append(Worker(pid, int(said["SLURM_PROCID"]), life, said.get("SLURMD_NODENAME", "")))
    return sorted(found, key=lambda worker: worker.rank)


def _is_task(pid: int) -> bool:
    """A child of slurmstepd, or of Apptainer's starter; not of a worker."""
    stat = _stat(pid)
    parent = _stat(stat[2]) if stat else None
    return parent is not None and not parent[0].startswith("python")


def step_daemons(job: str) -> list[int]:
    """The slurmstepd of each node of the step that the job's script runs now: the second where a stage ran before."""
    step = re.compile(rf"\[{re.escape(job)}\.\d+\]")
    return [pid for pid, name, _, _ in _all() if name == "slurmstepd" and step.search(_command(pid))]


def step_of(worker: Worker) -> str:
    """The worker's step as scancel names it, such as 17.1."""
    said = _environment(worker.pid)
    return f"{said['FT_JOB']}.{said['SLURM_STEP_ID']}"


def batch_shell(job: str) -> int | None:
    """The shell that runs the job's script."""
    for pid, name, _, _ in _all():
        if name.startswith("slurm_scrip") and f"job{job}/" in _command(pid):
            return pid
    return None


def sruns(job: str) -> list[int]:
    """The job's srun and the helper it forks."""
    named = [pid for pid, name, _, _ in _all() if name == "srun"]
    return [pid for pid in named if _environment(pid).get("SLURM_JOB_ID") == job]


def on_node(job: str, node: str) -> list[int]:
    """All that the job runs on one node: slurmstepds first, then their children."""
    found = []
    for pid, name, _, _ in _all():
        if name == "slurmstepd" and f"[{job}." in _command(pid) and _node_of_daemon(pid) == node:
            found.append(pid)
    return found + [pid for pid, _, _, parent in _all() if parent in found]


def _node_of_daemon(pid: int) -> str:
    """The hostname in the daemon's own namespace: each node has one."""
    try:
        uts = os.readlink(PROC / str(pid) / "ns" / "uts")
    except OSError:
        return ""
    for other, name, _, _ in _all():
        if name == "slurmd" and uts == os.readlink(PROC / str(other) / "ns" / "uts"):
            words = _command(other).split()
            return words[words.index("-N") + 1] if "-N" in words else ""
    return ""


def freeze(chosen: list[Worker]) -> bool:
    """SIGSTOP; returns when all threads stand. False when one was gone."""
    return all([_signal(worker.pid, signal.SIGSTOP) for worker in chosen]) and all(_stands(w.pid) for w in chosen)


def thaw(chosen: list[Worker]) -> None:
    """SIGCONT."""
    for worker in chosen:
        _signal(worker.pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone is no error."""
    _signal(pid, signal.SIGKILL)


def signal_to(pid: int, number: int) -> None:
    """One signal; a process that is gone is no error."""
    _signal(pid, number)


def _signal(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def _stands(pid: int) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        stat = _stat(pid)
        if stat is None or stat[1] in "ZX":
            return False
        if stat[1] == "T":
            return True
        time.sleep(0.001)
    return False


def _mask(pid: int, field: str) -> int:
    try:
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1], 16)
    except OSError:
        pass
    return 0


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    return bool(_mask(pid, "SigCgt") >> (number - 1) & 1)


def pending(pid: int, number: int) -> bool:
    """Whether the signal waits for the (stopped) process."""
    return bool((_mask(pid, "SigPnd") | _mask(pid, "ShdPnd")) >> (number - 1) & 1)


def mapped(pid: int, name: str) -> bool:
    """Whether a file with `name` in its path is mapped into the process's memory."""
    try:
        return name in (PROC / str(pid) / "maps").read_text()
    except OSError:
        return False
