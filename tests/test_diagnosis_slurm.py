"""What a real Slurm leaves of an attempt's end: the cause that its epilogue settles, and that no cancelled job returns.

The batch script is what a stage's is: our prologue, srun, our epilogue. Its task is a process of a few lines that
obeys the warnings as a stage does. All attempts run at the same time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.chaos import processes
from ftlib.rundir import RunDir
from ftlib.runs.events import Cancelled, Settled
from tests.cluster import Slurm, eventually
from tests.wishes import CHECKOUT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TASK = """
import os, signal, sys, time

def told(number, frame):
    cause = "time limit" if number == signal.SIGUSR2 else "preemption"
    if os.environ["OBEYS"] == "0":
        return
    time.sleep(0.3)
    if rank == 0:
        with open(f"{os.environ['FT_RUN']}/outcomes/train-{os.environ['FT_LIFE']}", "w") as file:
            file.write(f"75 interrupted ({cause}), saved at step 3\\n")
    os._exit(75)

rank = int(os.environ["SLURM_PROCID"])
signal.signal(signal.SIGUSR2, told)
signal.signal(signal.SIGTERM, told)
print("warned", os.environ["FT_WARNING_S"], "s before the limit", flush=True)
end = time.monotonic() + float(os.environ.get("FAILS_AFTER_S", "600"))
while time.monotonic() < end:
    time.sleep(0.05)
if rank == 0:
    print("RuntimeError: rank 1 (node n2) did not arrive within 6 s", flush=True)
    os._exit(1)
time.sleep(600)
"""

SCRIPT = """#!/bin/bash
#SBATCH --output={run}/slurm/train/%j_0_log.out
#SBATCH --open-mode=append
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --mem=200
#SBATCH --time=20
#SBATCH --requeue
#SBATCH --signal=USR2@77
export FT_RUN={run} FT_STAGE=train FT_PYTHON={python} FT_REQUEUE=1 FT_WATCH_S=2 {more}
cd $FT_RUN/code
. slurm_templates/prologue.sh
srun --unbuffered --kill-on-bad-exit=1 --open-mode=append --output {run}/slurm/train/%j_%t_log.out {python} {task}
. slurm_templates/epilogue.sh
"""


@dataclass
class Job:
    """A run folder and the job that runs its only stage."""

    slurm: Slurm
    run: RunDir
    job_id: str
    nodes: int

    def begun(self) -> bool:
        """Whether every rank has its handlers."""
        logs = self.run.slurm.glob("train/*_log.out")
        return sum("warned 77 s" in path.read_text() for path in logs) >= self.nodes

    def settled(self) -> list[str]:
        """The causes of its attempts' ends."""
        return [event.cause for event in self.run.ledger().of(Settled)]


def submit(slurm: Slurm, folder: Path, name: str, *options: str, nodes: int = 1, **environment: str) -> Job:
    run = folder / name
    for part in ("events", "outcomes", "lives", "slurm/train", "code"):
        (run / part).mkdir(parents=True)
    for part in ("ftlib", "slurm_templates"):
        (run / "code" / part).symlink_to(CHECKOUT / part)
    stage = {"nodes": nodes, "tasks_per_node": 1, "time_min": 20, "warning_s": 77}
    plan = {"micro_batch": 8, "accumulation": 2, "stages": {"train": stage}}
    (run / "plan.json").write_text(json.dumps(plan))
    task = folder / "task.py"
    task.write_text(TASK)
    more = " ".join(f"{key}={value}" for key, value in {"OBEYS": "1", **environment}.items())
    script = run / "job.sh"
    script.write_text(SCRIPT.format(run=run, nodes=nodes, python=sys.executable, more=more, task=task))
    return Job(slurm, RunDir(run), slurm.sbatch(*options, str(script)), nodes)


def cancel(job: Job) -> None:
    job.slurm.run(["scancel", job.job_id])


def save(job: Job) -> None:
    """Tell it to save, and wait until it has: the epilogue begins."""
    job.slurm.run(["scancel", "-s", "USR2", f"{job.job_id}.0"])
    assert eventually((job.run.outcomes / "train-1").exists, 30)


def cancel_in_the_epilogue(job: Job) -> None:
    save(job)
    cancel(job)


def make_cancel_in_the_epilogue(job: Job) -> None:
    save(job)
    job.run.record(Cancelled(stage="train", job_id=job.job_id))
    cancel(job)


def requeue(job: Job) -> None:
    job.slurm.run(["scontrol", "requeue", job.job_id])


def requeue_and_cancel_as_it_waits(job: Job) -> None:
    requeue(job)
    job.slurm.wait(job.job_id, "PENDING", 60)
    cancel(job)


def preempt(job: Job) -> None:
    (node,) = {path.read_text().split()[1] for path in job.run.lives.glob("train-1")}
    urgent = ("--qos=group", "-w", node, "-c8", "--mem=1000", "-t1", "--output=/dev/null", "--wrap=sleep 1")
    job.slurm.sbatch(*urgent)


def kill_second_rank(job: Job) -> None:
    os.kill(rank_of(job, 1), signal.SIGKILL)


def rank_of(job: Job, rank: int) -> int:
    """The process of a rank."""
    for pid, name, _, _ in processes._all():
        environment = processes._environment(pid) if name.startswith("python") else {}
        if (environment.get("FT_RUN"), environment.get("SLURM_PROCID")) == (str(job.run.path), str(rank)):
            return pid
    raise AssertionError(f"rank {rank} has no process")


@dataclass(frozen=True)
class Case:
    """What is done to an attempt, and what its end must be called."""

    end: Callable[[Job], None]
    causes: tuple[str, ...]
    returns: bool  # a next attempt begins
    nodes: int = 1
    obeys: str = "1"
    options: tuple[str, ...] = ()
    accounting: bool = True


CASES = {
    "scancel, saved": Case(cancel, ("cancelled",), returns=False),
    "scancel of two nodes": Case(cancel, ("cancelled",), returns=False, nodes=2),
    # Slurm kills the batch shell soon after: its epilogue may come too late to write anything.
    "scancel, outstayed": Case(cancel, ("cancelled", ""), returns=False, obeys="0"),
    "scancel in the epilogue": Case(cancel_in_the_epilogue, ("cancelled", "by hand"), returns=False),
    "make cancel in the epilogue": Case(make_cancel_in_the_epilogue, ("cancelled",), returns=False),
    "scancel while it waits again": Case(requeue_and_cancel_as_it_waits, ("by hand",), returns=False),
    "SIGUSR2 by hand": Case(save, ("by hand",), returns=True),
    "requeue": Case(requeue, ("by hand",), returns=True),
    "preemption": Case(preempt, ("preemption",), returns=True, options=("--qos=group-b",)),
    "scancel without accounting": Case(cancel, ("cancelled",), returns=False, accounting=False),
    "SIGUSR2 by hand without accounting": Case(save, ("by hand",), returns=True, accounting=False),
    "requeue without accounting": Case(requeue, ("by hand",), returns=True, accounting=False),
    "a second rank killed": Case(kill_second_rank, ("killed",), returns=True, nodes=2),
}


@pytest.fixture(scope="module")
def ended(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All cases at once, each ended in its way, and settled where its epilogue can."""
    folder = tmp_path_factory.mktemp("ends")
    tools = folder / "bin"
    tools.mkdir()
    (tools / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    (tools / "sacct").chmod(0o755)
    jobs = {}
    for number, (name, case) in enumerate(CASES.items()):
        path = "$PATH" if case.accounting else f"{tools}:$PATH"
        jobs[name] = submit(
            slurm, folder, f"end-{number}", *case.options, nodes=case.nodes, OBEYS=case.obeys, PATH=f'"{path}"'
        )
    try:
        for name, job in jobs.items():
            assert eventually(job.begun, 60), f"{name}: {slurm.squeue()}"
        # The preempting job takes a node; the others are ended before it.
        for name in sorted(CASES, key=lambda name: name == "preemption"):
            CASES[name].end(jobs[name])
        for name, job in jobs.items():
            if "" not in CASES[name].causes:
                assert eventually(lambda job=job: bool(job.settled()), 60), name  # type: ignore[misc]
        for name, job in jobs.items():
            if CASES[name].returns:
                assert eventually((job.run.lives / "train-2").exists, 60), name
        # Longer than any requeue needs to bring a job back.
        time.sleep(5)
    finally:
        slurm.run(["scancel", *(job.job_id for job in jobs.values())])
    return jobs


@pytest.mark.parametrize("name", CASES)
def test_the_epilogue_names_the_cause_of_the_end(ended: dict[str, Job], name: str) -> None:
    causes = ended[name].settled()
    assert (causes[0] if causes else "") in CASES[name].causes


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.returns])
def test_a_cancelled_job_does_not_return(ended: dict[str, Job], name: str) -> None:
    job = ended[name]
    assert job.slurm.wait(job.job_id, "CANCELLED", 30)
    assert not (job.run.lives / "train-2").exists()


@pytest.mark.nightly
def test_a_slurmstepd_killed_on_the_second_node_is_not_called_lost_touch(slurm: Slurm, tmp_path: Path) -> None:
    """srun never hears of that rank's end; the first one waits for it, and fails."""
    job = submit(slurm, tmp_path, "beyond", nodes=2, FAILS_AFTER_S="6")
    try:
        assert eventually(job.begun, 60)
        own = processes.step_daemons(job.job_id)
        (beyond,) = [pid for pid in own if processes._node_of_daemon(pid) != batch_node(job)]
        os.kill(beyond, signal.SIGKILL)
        assert eventually(lambda: bool(job.settled()), 120)
        (settled,) = job.run.ledger().of(Settled)
        assert settled.cause == "unknown" and "rank 1" in settled.message
    finally:
        slurm.run(["scancel", job.job_id])


def batch_node(job: Job) -> str:
    return (job.run.lives / "train-1").read_text().split()[1]
