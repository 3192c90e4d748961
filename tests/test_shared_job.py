"""Export and evaluation in one Slurm job: interrupted in each of them and between the two, cancelled, resumed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks.chaos import processes
from ftlib.rundir import RunDir
from ftlib.runs.events import Settled
from tests.array_shims import quick_python
from tests.cluster import Slurm
from tests.test_chain import finished, log, submit, until
from tests.wishes import copied_checkout, jobs, status

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied checkout and, beside it, an interpreter whose stages wait where a file tells them to."""
    folder = tmp_path_factory.mktemp("shared")
    copied_checkout(folder)
    quick_python(folder, 0.5)
    return folder


def begin(place: Path, *, slow: str = "") -> RunDir:
    """A run in the job of export and evaluation; `slow`: the stage whose first attempt lasts until it is warned."""
    (place / "held").touch()
    checkout = next(place.glob("ada*"))
    python = f"cluster.python={shlex.quote(str(place / 'python'))}"
    run = submit(checkout, "--new", settings=f"{python} cluster.qos=group-b cluster.cpu_qos=group")
    (run.path / "slow").write_text(slow)
    (place / "held").unlink()
    if slow:
        until(lambda: started(run, slow), 60, f"the start of {slow}")
    return run


def started(run: RunDir, stage: str, attempt: int = 1) -> bool:
    return (run.path / "pids" / f"{stage}-{attempt}").exists()


def attempts(run: RunDir, stage: str) -> int:
    return len(list(run.lives.glob(f"{stage}-*")))


def job(run: RunDir) -> str:
    found = run.ledger().jobs
    assert found["export"] == found["evaluate"]
    return found["export"]


def checkout_of(run: RunDir) -> Path:
    return run.path.parent.parent


def preempt(slurm: Slurm) -> None:
    words = ("--qos=group", "--nodes=3", "--gres=gpu:a100:2", "--output=/dev/null", "--wrap=sleep 1")
    slurm.wait(slurm.sbatch(*words), "COMPLETED", 90)


def test_both_stages_run_in_one_job_with_a_log_and_an_attempt_of_their_own(place: Path, slurm: Slurm) -> None:
    run = begin(place)
    assert finished(checkout_of(run), run)["state"] == "completed", log(run)
    rows = slurm.sacct(job(run))
    assert rows[0]["State"] == "COMPLETED" and "gres/gpu" in rows[0]["ReqTRES"]
    for stage in ("export", "evaluate"):
        (written,) = (run.slurm / stage).glob("*_log.out")
        assert f"quick: {stage}\n" in written.read_text(), log(run)
        assert written.name == f"{job(run)}_0_log.out" and attempts(run, stage) == 1
    assert "quick: evaluate" not in (run.slurm / "export" / f"{job(run)}_0_log.out").read_text()


@pytest.mark.parametrize("stage", ["export", "evaluate"])
def test_preempted_in_either_stage_the_job_resumes_in_that_one(place: Path, slurm: Slurm, stage: str) -> None:
    run = begin(place, slow=stage)
    found = status(checkout_of(run), run.name)["stages"]
    assert found[stage]["state"] == "running"
    assert found["evaluate"]["state"] == ("queued" if stage == "export" else "running")
    if stage == "export":
        assert found["evaluate"]["words"] == "in the same job, after export"
    number = job(run)
    preempt(slurm)
    assert finished(checkout_of(run), run)["state"] == "completed", log(run)
    assert job(run) == number
    assert (attempts(run, "export"), attempts(run, "evaluate")) == ((2, 1) if stage == "export" else (1, 2))
    causes = {settled.stage: settled.cause for settled in run.ledger().of(Settled)}
    assert causes == {stage: "preemption"}


def test_a_batch_shell_killed_between_the_two_leaves_the_evaluation_to_the_recovery_job(
    place: Path, slurm: Slurm
) -> None:
    run = begin(place, slow="evaluate")
    number = job(run)
    shell = processes.batch_shell(number)
    assert shell
    processes.kill(shell)
    # The run is "failed" until the recovery job has looked at it.
    until(lambda: run.stage_done("evaluate"), 120, "the evaluation's second attempt")
    found = run.ledger().jobs
    assert found["export"] == number != found["evaluate"]
    assert attempts(run, "export") == 1 and attempts(run, "evaluate") == 2


def test_cancelled_in_the_evaluation_it_stays_so_until_it_is_resumed(place: Path, slurm: Slurm) -> None:
    run = begin(place, slow="evaluate")
    number, checkout = job(run), checkout_of(run)
    done = jobs("cancel", "--run", run.name, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert finished(checkout, run, 60)["state"] == "cancelled"
    slurm.wait(number, "CANCELLED", 30)
    assert attempts(run, "evaluate") == 1
    resumed = jobs("resume", "--run", run.name, checkout=checkout)
    assert resumed.returncode == 0 and "Continuing at evaluate" in resumed.stdout, resumed.stderr
    assert finished(checkout, run)["state"] == "completed", log(run)
    assert run.ledger().jobs["evaluate"] != number and attempts(run, "export") == 1


@pytest.mark.nightly  # quick tests kill a step's daemon in a job of one stage
def test_a_step_whose_daemon_is_killed_in_the_second_stage_is_ended_and_begun_again(place: Path, slurm: Slurm) -> None:
    """The watcher of the second stage looks for the job's second step."""
    run = begin(place, slow="evaluate")
    number = job(run)
    (daemon,) = until(lambda: processes.step_daemons(number), 20, "the second step's daemon")
    processes.kill(daemon)
    assert finished(checkout_of(run), run)["state"] == "completed", log(run)
    causes = {settled.stage: settled.cause for settled in run.ledger().of(Settled)}
    assert causes == {"evaluate": "killed"}, log(run)

