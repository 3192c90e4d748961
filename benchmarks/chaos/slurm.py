"""What chaos asks of the local test cluster: its commands, and the ways to hurt and to heal it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = CHECKOUT / "env/local_slurm/cluster.py"
DIR = Path(os.environ.get("FTLIB_SLURM_DIR") or "/tmp/ftlib-slurm")
CONF = DIR / "slurm.conf"
URGENT, YIELDING = "group", "group-b"  # the first preempts the second, with a grace of GRACE_S
GRACE_S = 10
FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_")
ENV = {**{k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}, "SLURM_CONF": str(CONF)}


class Trouble(Exception):
    """The campaign cannot go on: a command failed, or something did not happen in time."""


def say(*command: str, check: bool = True) -> str:
    """A Slurm command's output, stripped."""
    done = subprocess.run(command, env=ENV, text=True, capture_output=True, timeout=120)
    if check and done.returncode:
        raise Trouble(f"{' '.join(command)} exited {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def until(check: Callable[[], object], timeout_s: float, what: str, pause_s: float = 0.2) -> None:
    """Poll until `check` is true; Trouble when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise Trouble(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(pause_s)


def healthy() -> bool:
    """Whether the cluster is up and well."""
    return subprocess.run([sys.executable, str(SCRIPT), "status"], capture_output=True, timeout=120).returncode == 0


def up() -> bool:
    """Start the cluster where it is not up; whether it was."""
    if healthy():
        return True
    done = subprocess.run([sys.executable, str(SCRIPT), "up"], text=True, capture_output=True, timeout=600)
    if done.returncode:
        raise Trouble(f"no local Slurm: {done.stderr.strip() or done.stdout.strip()}")
    return False


def down() -> None:
    """Stop the cluster."""
    subprocess.run([sys.executable, str(SCRIPT), "down"], capture_output=True, timeout=120)


def heal() -> None:
    """The cluster as `up` made it: controller, nodes and grace."""
    if not _controller_alive():
        start_controller()
    for line in say("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T").splitlines():
        node, state = line.split()
        if state.startswith(("down", "drain")):
            say("scontrol", "update", f"NodeName={node}", "State=resume")
    set_grace(GRACE_S)


def set_grace(seconds: int) -> None:
    """GraceTime of the yielding QOS. Accounting tells the controller before it answers us; a second for its sake."""
    clock = f"00:00:{seconds:02}"
    if clock not in say("sacctmgr", "-n", "-P", "show", "qos", YIELDING, "format=gracetime"):
        say("sacctmgr", "-i", "-Q", "modify", "qos", YIELDING, "set", f"GraceTime={seconds}")
        time.sleep(1)


def job(job_id: str) -> dict[str, str]:
    """The controller's words about a job: field -> value; empty where it knows none."""
    text = say("scontrol", "show", "job", "-o", job_id, check=False)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def state(job_id: str) -> str:
    """The job's state; empty where the controller has forgotten it."""
    return job(job_id).get("JobState", "")


def preempt(node: str) -> str:
    """Queue a job of a second with the higher claim to the whole of `node`; returns its id."""
    words = ("--parsable", f"--qos={URGENT}", "-w", node, "-c8", "--mem=1000", "-t1", "--output=/dev/null")
    return say("sbatch", *words, "--wrap=sleep 1")


def kill_controller(*, knows_since: float) -> None:
    """SIGKILL to slurmctld, once it has written down what it knew then: a job that it has not is lost to Slurm."""
    until(lambda: (DIR / "state/job_state").stat().st_mtime > knows_since, 60, "the controller's state on disk")
    os.kill(_pid("slurmctld"), signal.SIGKILL)
    until(lambda: not _controller_alive(), 10, "the controller's end")


def start_controller() -> None:
    """slurmctld anew, over the state it left; returns when it answers."""
    sys.path.insert(0, str(SCRIPT.parent))
    import daemons

    daemons.start("slurmctld", "slurmctld", "-D")
    ping = ["scontrol", "ping"]
    until(lambda: subprocess.run(ping, env=ENV, capture_output=True, timeout=60).returncode == 0, 60, "slurmctld")


def _pid(daemon: str) -> int:
    return int((DIR / f"run/{daemon}.pid").read_text())


def _controller_alive() -> bool:
    try:
        stat = Path(f"/proc/{_pid('slurmctld')}/stat").read_text()
    except OSError:
        return False
    return "(slurmctld)" in stat and stat.rpartition(")")[2].split()[0] != "Z"
