"""A run folder that is moved or deleted while its run is at work: the job says so and ends; nothing is made anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import rundir
from ftlib.rundir import RunDir
from ftlib.runs import outcome
from ftlib.runs.events import Started
from ftlib.runs.outcome import Outcome
from tests.cluster import Slurm
from tests.processes import started
from tests.test_chain import steps, submit, until
from tests.wishes import CHECKOUT, jobs

GONE = "is not there any more: it was moved or deleted"
# A stage that works until its run folder is gone, and then needs it.
WORK = """
import time

def main(run, life, stop):
    print("at work", flush=True)
    while run.path.exists():
        time.sleep(0.05)
    {then}
"""


def made(place: Path, then: str = "return 'done'") -> RunDir:
    code = place / "source"
    for name in ("ftlib", "jobs"):
        shutil.copytree(CHECKOUT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "jobs" / "work.py").write_text(WORK.format(then=then))
    plan = {"stages": {"work": {"device": "cpu", "gpus_per_node": 0}}}
    # A snapshot that many runs share, so that the code outlives the folder.
    run = rundir.create(place / "runs", "tiny-1", {"spec.json": {}, "plan.json": plan}, code)
    (run.lives / "work-1").write_text("7 n1 1700000000\n")
    return run


@pytest.mark.parametrize("how", ["moved", "deleted"])
@pytest.mark.parametrize("then", ["return 'done'", "(run.path / 'x' / 'y').write_text('z')"], ids=["ends", "fails"])
def test_an_attempt_says_so_and_makes_nothing_anew(tmp_path: Path, how: str, then: str) -> None:
    run = made(tmp_path, then)
    command = [sys.executable, "-u", "-m", "jobs.stage", str(run.path), "work"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    with started(
        command, cwd=(run.code).resolve(), env={**environment, "FT_LIFE": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while "at work" not in (line := process.stdout.readline()):
            assert line, "it ended"
        if how == "moved":
            run.path.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run.path)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 64 and f"{run.path} {GONE}" in said
    assert "Traceback" not in said
    assert not run.path.exists()


def test_an_attempt_that_needs_nothing_of_it_ends_too(tmp_path: Path) -> None:
    (tmp_path / "runs" / "lives").mkdir(parents=True)
    (tmp_path / "runs" / "lives" / "train-4").touch()
    code = (
        "import sys; from pathlib import Path; from ftlib.rundir import RunDir; from jobs import stage;"
        "stage.leave_when_superseded(RunDir(Path(sys.argv[1])), 'train', 4, every_s=0.05)"
    )
    with started(
        [sys.executable, "-u", "-c", code, str(tmp_path / "runs")], cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        shutil.rmtree(tmp_path / "runs")
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 64 and GONE in said


def test_events_and_outcomes_of_a_run_that_is_gone_are_not_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        run.record(Started(stage="train", attempt=1, job_id="7", node="n1"), writer="train-1")
    with pytest.raises(FileNotFoundError):
        outcome.settle(run.outcomes, Outcome("train", 1, 0, "trained"))
    assert not run.path.exists()


def test_checkpoints_of_a_run_that_is_gone_are_not_written(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch: the train extra")
    from ftlib.train.interval import Cadence, History
    from ftlib.train.saving import Keeping

    run = RunDir(tmp_path / "gone")
    cadence = Cadence(10, 8.0, History())
    keeping = Keeping(run, 1, every=None, metrics=None, cadence=cadence)
    with pytest.raises(FileNotFoundError):
        keeping.save(10, lambda folder, sealer: None, 1 << 20, best=None)
    assert not run.path.exists()


def test_the_epilogue_ends_the_job_plainly(tmp_path: Path) -> None:
    script = "(exit 75)\n. slurm_templates/epilogue.sh\necho requeued"
    environment = {
        **os.environ, "FT_RUN": str(tmp_path / "gone"), "FT_STAGE": "train", "FT_LIFE": "1", "FT_WATCH": "",
        "FT_PYTHON": sys.executable, "FT_JOB": "7", "FT_LOG": str(tmp_path / "log"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], cwd=CHECKOUT, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 64 and GONE in done.stdout and "requeued" not in done.stdout
    assert not (tmp_path / "gone").exists()


def test_the_recovery_job_ends_plainly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.guard", str(tmp_path / "gone")]
    done = subprocess.run(command, cwd=CHECKOUT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 64 and GONE in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_on_slurm_the_chain_ends(checkout: Path, slurm: Slurm, tmp_path: Path, how: str) -> None:
    pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    run = submit(checkout, settings="train.steps=5000 train.save_every_steps=50")
    until(lambda: steps(run) > 5, 180, "5 steps")
    if how == "moved":
        place = tmp_path / "runs"
        place.mkdir()
        run.path.rename(place / run.name)
    else:
        shutil.rmtree(run.path)
    until(lambda: not slurm.run(["squeue", "-h", "--me", "-t", "PD,R,CG"]), 240, "the end of its jobs", pause_s=1)
    assert not run.path.exists()
    if how == "moved":
        text = "\n".join(path.read_text() for path in (place / run.name / "slurm" / "train").glob("*_log.out"))
        assert GONE in text
    assert run.name in jobs("status", "--run", run.name, checkout=checkout).stderr
