"""A log shown as it grows, and a job that a person waits for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from ftlib import state
from ftlib.profile import ClusterProfile
from ftlib.slurm import queue

# Results of other machines show late on a network file system.
LATE_S = 15


def show(log: Path, shown: int = 0, *, last: bool = False) -> int:
    """Print whole new lines of the log after byte `shown`, submitit's own left out; returns the new position."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    whole = new if last else new[: new.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        if line and not line.startswith("submitit "):
            print("    " + line, flush=True)
    return shown + len(whole)


def follow(job: str, log: Path, profile: ClusterProfile, done: Callable[[], object]) -> str:
    """Show a job's log until `done()`, or until Slurm says that it has ended; returns Slurm's last word of it.

    The scheduler is asked as rarely as its site wants.
    """
    assert profile.scheduler
    shown, told, asked, deadline = 0, "", -math.inf, math.inf
    while not done() and time.monotonic() < deadline:
        shown = show(log, shown)
        if time.monotonic() - asked > max(1.0, profile.scheduler.poll_interval_s) and deadline == math.inf:
            asked, found = time.monotonic(), queue.ask([job]).jobs[job]
            words = (found.state or "UNKNOWN") + (f" ({found.reason})" if found.reason not in ("", "None") else "")
            if state.SLURM_STATES.get(found.state) not in state.ACTIVE:
                deadline = asked + (0 if found.state == "CANCELLED" else LATE_S)
            elif words != told:
                print(f"job {job}: {words}", flush=True)
            told = words
        time.sleep(1)
    show(log, shown, last=True)
    return told
