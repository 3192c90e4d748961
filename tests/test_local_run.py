"""`submit` without Slurm: the same stages here, stopped and resumed, refused while another process works on the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftlib import checkpoint, metrics
from ftlib.rundir import RunDir
from tests.processes import started
from tests.wishes import jobs, run_names, status

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = pytest.mark.slow

SHORT = (
    "train.steps=60 train.save_every_steps=20 train.eval_every_steps=25 data.pairs=600 method.dropout=0.1 "
    "train.log_every_steps=10 evaluate.pairs=16 evaluate.max_new_tokens=16"
)


@pytest.fixture(scope="module")
def whole(checkout: Path) -> RunDir:
    """A run that nothing interrupted, from the shell of an interactive job of two tasks."""
    inside = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2"}
    done = jobs("submit", "--cluster", "local", "--set", SHORT, checkout=checkout, **inside)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = run_names(checkout)
    run = RunDir(checkout / "runs" / name)
    for words in ("[1/4] prepare", "[4/4] evaluate", "Results:"):
        assert words in done.stdout
    return run


def final_weights(run: RunDir) -> str:
    newest, rejected = checkpoint.newest(run.checkpoints, run=run.name)
    assert newest and not rejected
    return checkpoint.digest(newest / "adapter_model.safetensors")


def losses(run: RunDir) -> list[tuple[Any, ...]]:
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in metrics.read_metrics(run.metrics_file)]


def test_all_stages_complete_and_leave_what_a_person_wants(whole: RunDir, checkout: Path) -> None:
    found = status(checkout, whole.name)
    assert found["state"] == "completed"
    assert {stage["state"] for stage in found["stages"].values()} == {"completed"}
    evaluation = json.loads(whole.evaluation_file.read_text())
    assert {"base", "tuned", "copy"} <= evaluation.keys()
    assert evaluation["copy"]["exact"] == 0
    for path in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (whole.export / path).exists()
    assert whole.name in whole.report_file.read_text()


def test_the_same_wish_is_the_same_run(whole: RunDir, checkout: Path) -> None:
    again = jobs("submit", "--cluster", "local", "--set", SHORT, checkout=checkout)
    assert again.returncode == 0 and f"submitted before: run {whole.name}." in again.stdout
    assert run_names(checkout) == [whole.name]


@pytest.fixture
def second(checkout: Path, whole: RunDir) -> Iterator[tuple[subprocess.Popen[str], RunDir]]:
    """The same wish as another run, on its way in a process group of its own, some steps into training."""
    with started(
        [sys.executable, "-m", "jobs", "submit", "--cluster", "local", "--new", "--set", SHORT],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        run = None
        while time.monotonic() < deadline and process.poll() is None:
            others = [name for name in run_names(checkout) if name.startswith(f"{whole.name}-")]
            run = RunDir(checkout / "runs" / others[-1]) if others else None
            if run and len(metrics.read_metrics(run.metrics_file)) > 22:
                break
            time.sleep(0.05)
        assert run and process.poll() is None
        yield process, run
    shutil.rmtree(run.path)


def test_ctrl_c_saves_and_resume_ends_bit_equal(
    second: tuple[subprocess.Popen[str], RunDir], whole: RunDir, checkout: Path
) -> None:
    process, run = second
    busy = jobs("resume", "--run", run.name, checkout=checkout)
    assert "is on its way" in busy.stdout
    # A terminal sends it to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"make resume RUN={run.name}" in said
    step = len([row for row in metrics.read_metrics(run.metrics_file) if "loss" in row])
    saved, _ = checkpoint.newest(run.checkpoints, run=run.name)
    assert saved and checkpoint.step_of(saved) == step
    assert status(checkout, run.name)["state"] == "cancelled"

    done = jobs("resume", "--run", run.name, checkout=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(whole)
    assert final_weights(run) == final_weights(whole)


def test_a_killed_stage_goes_on_by_itself_and_ends_bit_equal(
    second: tuple[subprocess.Popen[str], RunDir], whole: RunDir
) -> None:
    process, run = second
    from ftlib.runs.events import Started

    (started,) = run.ledger().of(Started, "train")
    os.kill(int(started.job_id), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resuming from the last checkpoint" in said
    assert losses(run) == losses(whole)
    assert final_weights(run) == final_weights(whole)
