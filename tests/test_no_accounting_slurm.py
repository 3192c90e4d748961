"""A real Slurm without accounting: a chain to its end, cancelled, resumed, and recovered from a killed batch shell.

The controller forgets a job seconds after its end there, and nobody else knows of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import processes
from ftlib.rundir import RunDir
from ftlib.runs.events import Resumed
from tests import cluster
from tests.cluster import SCRIPT, Slurm
from tests.test_chain import SHORT, finished, log, steps, until
from tests.wishes import jobs, run_names, status

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly]

# MinJobAge of that cluster, and the controller's own interval.
FORGOTTEN_S = 150


@pytest.fixture(scope="module")
def bare() -> Iterator[Slurm]:
    """A cluster without accounting, beside the others."""
    if os.geteuid() != 0:
        pytest.skip("no local Slurm: its daemons need root")
    folder = Path(f"{os.environ.get('FTLIB_SLURM_DIR') or cluster.USUAL}-bare")
    environment = {**os.environ, "FTLIB_SLURM_DIR": str(folder)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *words]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)

    with cluster._one_at_a_time():
        done = call("up", "--no-accounting")
    if done.returncode:
        pytest.skip(f"no local Slurm: {done.stderr.strip() or done.stdout.strip()}")
    assert "no accounting" in done.stdout or "already up" in done.stdout
    yield Slurm(folder / "slurm.conf")
    call("down", "--purge")


def submit(checkout: Path, bare: Slurm, settings: str = "") -> RunDir:
    before = set(run_names(checkout))
    conf = f"cluster.scheduler.slurm_conf={bare.env['SLURM_CONF']}"
    words = ("--cluster", "local-slurm", "--new", "--set", f"{SHORT} {conf} {settings}")
    done = jobs("submit", *words, checkout=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = set(run_names(checkout)) - before
    return RunDir(checkout / "runs" / name)


def forgotten(bare: Slurm, job: str) -> bool:
    return job not in bare.run(["squeue", "--me", "--noheader", "--states=all", "--format=%i"]).split()


def test_a_run_is_cancelled_resumed_and_completed(bare: Slurm, checkout: Path) -> None:
    run = submit(checkout, bare, "train.steps=400")
    until(lambda: steps(run) > 5, 180, "5 steps")
    job = status(checkout, run.name)["stages"]["train"]["job_id"]
    done = jobs("cancel", "--run", run.name, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert finished(checkout, run, 120)["state"] == "cancelled"
    until(lambda: forgotten(bare, job), FORGOTTEN_S, "the controller forgets the job", pause_s=1)
    assert status(checkout, run.name)["state"] == "cancelled"
    done = jobs("resume", "--run", run.name, checkout=checkout)
    assert done.returncode == 0, done.stderr
    found = finished(checkout, run)
    assert found["state"] == "completed", log(run)
    assert any(event.step > 0 for event in run.ledger().of(Resumed))


def test_the_recovery_job_queues_anew_after_a_killed_batch_shell(bare: Slurm, checkout: Path) -> None:
    run = submit(checkout, bare, "train.steps=200")
    until(lambda: steps(run) > 5, 180, "5 steps")
    job = status(checkout, run.name)["stages"]["train"]["job_id"]
    shell = processes.batch_shell(job)
    assert shell is not None
    processes.kill(shell)
    until(lambda: status(checkout, run.name)["stages"]["train"]["job_id"] != job, 120, "a new job", pause_s=1)
    assert finished(checkout, run)["state"] == "completed", log(run)
    recovered = [path.read_text() for path in (run.slurm / "guard").glob("*_log.out")]
    assert any("queued anew: train" in text for text in recovered) and not any("Traceback" in t for t in recovered)


def test_a_job_that_nobody_knows_any_more_has_ended_and_can_be_resumed(bare: Slurm, checkout: Path) -> None:
    """A plain scancel leaves no event: what was seen of it is remembered, or the run has failed, and can be resumed."""
    run = submit(checkout, bare, "train.steps=20")
    until(lambda: status(checkout, run.name)["stages"]["prepare"]["state"] != "queued", 120, "its start")
    job = status(checkout, run.name)["stages"]["evaluate"]["job_id"]
    bare.run(["scancel", "--me"])
    found = finished(checkout, run, 120)
    assert found["state"] == "cancelled"
    until(lambda: forgotten(bare, job), FORGOTTEN_S, "the controller forgets the job", pause_s=1)
    assert status(checkout, run.name)["state"] in ("cancelled", "failed")
    done = jobs("resume", "--run", run.name, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert finished(checkout, run)["state"] == "completed", log(run)
