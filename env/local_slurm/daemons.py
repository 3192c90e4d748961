"""The cluster's processes: start them so that they outlive the caller, find them, stop them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from layout import CONF, DIR, ENV, NODES, fail, has_accounting

ACCOUNTING = ("mariadbd", "slurmdbd")
DAEMONS = ("munged", *ACCOUNTING, "slurmctld", *(f"slurmd-{node}" for node in NODES))
# Daemons carry this variable, which is how `down` finds them.
MARK = f"FTLIB_SLURM_MARK={DIR}"
START_TIMEOUT_S = 60


def daemons() -> list[str]:
    """Those that this cluster has."""
    return [daemon for daemon in DAEMONS if has_accounting() or daemon not in ACCOUNTING]


def our_processes() -> set[int]:
    """Our daemons, the steps' slurmstepds and all that runs in a job, whatever became of pid files and parents."""
    found, children = set(), dict[int, list[int]]()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile
            continue
        pid = int(entry.name)
        children.setdefault(int(rest.split()[1]), []).append(pid)
        variables = environment.split(b"\0")
        daemon = MARK.encode() in variables
        # These write their title over the first of their variables.
        step = name in ("slurmstepd", "slurmscriptd") and f"={DIR}/".encode() in environment
        task = f"SLURM_CONF={CONF}".encode() in variables and b"\0SLURMD_NODENAME=" in b"\0" + environment
        if daemon or step or task:
            found.add(pid)
    waiting = list(found)
    while waiting:
        fresh = [child for child in children.get(waiting.pop(), []) if child not in found and child != os.getpid()]
        found.update(fresh)
        waiting += fresh
    return found


def stop_all() -> None:
    """Kill at once: nothing of this state is used again. Repeated, as a dying slurmd may still start a child."""
    deadline = time.monotonic() + 20
    while pids := our_processes():
        if time.monotonic() > deadline:
            fail(1, f"processes that do not end: {sorted(pids)}")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def alive(daemon: str) -> bool:
    try:
        pid = int((DIR / f"run/{daemon}.pid").read_text())
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        return name == daemon.partition("-")[0] and rest.split()[0] != "Z"
    except (OSError, ValueError):
        return False


def tail(daemon: str, lines: int = 15) -> str:
    """The end of its own log, or of its output where it died before it had one."""
    for log in (DIR / f"log/{daemon}.log", DIR / f"log/{daemon}.out"):
        if log.exists() and log.stat().st_size:
            ends = log.read_text(errors="replace").splitlines()[-lines:]
            return f"{log} ends:\n" + "\n".join(f"  {line}" for line in ends)
    return f"{daemon} said nothing"


def start(daemon: str, *command: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """A session of its own and no open pipes, so that it outlives the caller and never makes one wait."""
    env = {**ENV, "FTLIB_SLURM_MARK": str(DIR)}
    with open(DIR / f"log/{daemon}.out", "ab") as out:
        process = subprocess.Popen(
            [*wrapper, *command],
            env=env,
            cwd=DIR,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    (DIR / f"run/{daemon}.pid").write_text(f"{process.pid}\n")
    return process


def wait_for(what: str, ready: Callable[[], bool], **daemons: subprocess.Popen[bytes]) -> None:
    """Poll until ready; a daemon that ends meanwhile, or the time-out, is told with the end of its log."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        dead = [name for name, process in daemons.items() if process.poll() is not None]
        if dead or time.monotonic() > deadline:
            why = "ended at once" if dead else f"not ready within {START_TIMEOUT_S} s"
            names = [name.replace("_", "-") for name in dead or daemons]
            logs = "\n".join(tail(name) for name in names)
            stop_all()
            fail(1, f"{what}: {', '.join(names)} {why}\n{logs}")
        time.sleep(0.1)
