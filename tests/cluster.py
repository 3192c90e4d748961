"""The `slurm` fixture: a local test cluster of env/local_slurm, up and healthy, and what tests ask of it.

Each process that runs tests has a cluster of its own: the usual one (`make cluster`) or, where another process has it,
one beside it, with -2, -3, … behind its folder's name. The usual one stays as it was if it is up, and stays up for the
next run, except where CI is set. The others begin afresh and end with their process. Where a cluster cannot run, tests
skip with the reason; with REQUIRE=slurm they fail.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "env/local_slurm/cluster.py"
SACCT_FIELDS = ("JobID", "JobName", "State", "ExitCode", "QOS", "Account", "ReqTRES", "NodeList", "Start", "End")
# More than there are workers.
MOST_CLUSTERS = 32
# What a job finds in its surroundings must be this cluster's, even where the tests themselves run inside a job.
FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_")


# Where `make cluster` starts one.
USUAL = Path(os.environ.get("FTLIB_SLURM_DIR") or "/tmp/ftlib-slurm")
_held: list[IO[str]] = []


def claim() -> None:
    """Choose this process's cluster, which no other process uses, before any module of tests asks where it is.

    For as long as this process runs it holds a lock beside the cluster's folder. Nothing is started yet.
    """
    if os.geteuid() != 0:
        return  # only root starts clusters
    # Worker gw1 takes the second one in each run where it can, and so on.
    first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    USUAL.parent.mkdir(parents=True, exist_ok=True)
    for number in (*range(first, MOST_CLUSTERS), *range(first)):
        folder = USUAL.with_name(f"{USUAL.name}-{number + 1}") if number else USUAL
        lock = open(f"{folder}.tests", "w")  # noqa: SIM115 - open until this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _held.append(lock)
        if number:
            os.environ["FTLIB_SLURM_DIR"] = str(folder)
        return
    pytest.exit(f"{MOST_CLUSTERS} other processes test beside {USUAL}")


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two clusters that start at once would find the same ports free."""
    with open(f"{USUAL}.starting", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Slurm:
    """A running cluster. `env` is the environment for any command that should speak to it."""

    def __init__(self, conf: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.env = {**kept, "SLURM_CONF": str(conf)}

    def run(self, cmd: list[str], timeout_s: float = 60) -> str:
        """Standard output, stripped. A command that fails fails the test, with its words."""
        done = subprocess.run(cmd, env=self.env, text=True, capture_output=True, timeout=timeout_s)
        assert done.returncode == 0, f"{cmd} exited {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *args: str) -> str:
        """Submit; returns the job id."""
        return self.run(["sbatch", "--parsable", *args]).partition(";")[0]

    def state(self, job_id: str) -> str:
        """RUNNING, COMPLETED, ...: slurmctld's word, and once it has forgotten the job, accounting's."""
        command = ["squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T"]
        done = subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=60)
        lines = done.stdout.split() or self.run(["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "state"]).splitlines()
        return lines[0].split()[0] if lines else "UNKNOWN"  # "CANCELLED by 0"

    def wait(self, job_id: str, states: str | Collection[str], timeout_s: float = 60) -> str:
        """Poll until the job (or array task `ID_INDEX`) is in one of the states; returns which."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in wanted:
            if time.monotonic() > deadline:
                pytest.fail(
                    f"job {job_id} is {state} after {timeout_s:.0f} s, not {sorted(wanted)}\n{self.squeue()}\n"
                    + "\n".join(str(row) for row in self.sacct(job_id))
                )
            time.sleep(0.2)
        return state

    def squeue(self) -> str:
        """The queue, for a person's eyes."""
        return self.run(["squeue", "-o", "%i %j %q %T %M %R"])

    def sacct(self, job_id: str) -> list[dict[str, str]]:
        """Accounting's rows by the names in SACCT_FIELDS: every life of the job (sacct -D), its steps too."""
        text = self.run(["sacct", "-D", "-n", "-P", "-j", job_id, "-o", ",".join(SACCT_FIELDS)])
        return [dict(zip(SACCT_FIELDS, line.split("|"), strict=True)) for line in text.splitlines()]


def eventually(check: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Whether it came true in time: accounting and files lag behind slurmctld."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def command(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), name], text=True, capture_output=True, timeout=600)


def _skip(why: str) -> NoReturn:
    if "slurm" in os.environ.get("REQUIRE", ""):
        pytest.fail(f"no local Slurm: {why}")
    pytest.skip(f"no local Slurm: {why}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """This process's cluster, or a skip with the reason (a failure with REQUIRE=slurm)."""
    if os.geteuid() != 0:
        _skip("its daemons, which tests also kill, need root")
    folder = Path(os.environ.get("FTLIB_SLURM_DIR") or USUAL)
    if folder != USUAL:
        command("down")
    was_up = command("status").returncode == 0
    if not was_up:
        with _one_at_a_time():
            started = command("up")
        if started.returncode != 0:
            _skip(started.stderr.strip() or started.stdout.strip())
    yield Slurm(folder / "slurm.conf")
    if folder != USUAL or (not was_up and os.environ.get("CI")):
        command("down")
