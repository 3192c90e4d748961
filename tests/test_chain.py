"""The chain on a real Slurm: to the end, preempted, cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ftlib import checkpoint, metrics
from ftlib.rundir import STAGES, RunDir
from ftlib.runs.events import Ended, Started
from tests.cluster import Slurm
from tests.wishes import jobs, run_names, status

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SHORT = (
    "train.steps=80 train.save_every_steps=30 data.pairs=600 method.dropout=0.1 train.log_every_steps=10 "
    "evaluate.pairs=16 evaluate.max_new_tokens=16"
)


def submit(checkout: Path, *words: str, settings: str = "") -> RunDir:
    before = set(run_names(checkout))
    done = jobs("submit", "--cluster", "local-slurm", "--set", f"{SHORT} {settings}", *words, checkout=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = set(run_names(checkout)) - before
    return RunDir(checkout / "runs" / name)


def until(check: Callable[[], Any], timeout_s: float, what: str, pause_s: float = 0.3) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(pause_s)
    return found


def log(run: RunDir) -> str:
    return "\n".join(path.read_text() for path in sorted(run.slurm.glob("*/*_log.out")))[-6000:]


def finished(checkout: Path, run: RunDir, timeout_s: float = 480) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        found = status(checkout, run.name)
        return found if found["state"] not in ("queued", "running") else None

    # Each look is a process of its own, which would take half a core from the jobs that are waited for.
    found = until(ended, timeout_s, f"the end of {run.name}", pause_s=1)
    assert isinstance(found, dict)
    return found


def steps(run: RunDir) -> int:
    return len(metrics.read_metrics(run.metrics_file))


@pytest.fixture(scope="module")
def whole(slurm: Slurm, checkout: Path) -> RunDir:
    """A run that nothing interrupted."""
    run = submit(checkout)
    found = finished(checkout, run)
    assert found["state"] == "completed", log(run)
    return run


def test_the_chain_completes_one_stage_after_the_other(whole: RunDir, checkout: Path, slurm: Slurm) -> None:
    found = status(checkout, whole.name)
    ids = [found["stages"][stage]["job_id"] for stage in STAGES]
    assert ids[2] == ids[3] and len(set(ids)) == 3  # export and evaluation share one
    rows = [slurm.sacct(job)[0] for job in ids[:3]]
    assert {row["State"] for row in rows} == {"COMPLETED"}
    for before, after in pairwise(rows):
        assert after["Start"] >= before["End"]
    assert ["gres/gpu" in row["ReqTRES"] for row in rows] == [False, True, True]


def test_each_stage_ran_the_snapshot_and_said_its_intent_first(whole: RunDir) -> None:
    names = [event.KIND for event in whole.ledger().events if event.writer.startswith("submit-")]
    two = ["intended", "intended", "submitted", "submitted"]
    assert names == ["intended", "submitted"] * 2 + two + ["intended", "submitted"]  # the last is the guard
    assert (whole.code / "ftlib" / "spec.py").exists()


def test_preempted_run_saves_goes_on_and_ends_bit_equal(whole: RunDir, checkout: Path, slurm: Slurm) -> None:
    run = submit(checkout, "--new", settings="cluster.qos=group-b cluster.cpu_qos=group")
    until(lambda: steps(run) > 35, 120, "35 steps")
    urgent = slurm.sbatch("--qos=group", "--nodes=3", "--gres=gpu:a100:2", "--output=/dev/null", "--wrap=sleep 3")
    until(lambda: (run.outcomes / "train-1").exists(), 30, "the first life's outcome")
    assert (run.outcomes / "train-1").read_text().startswith("75 interrupted (preemption), saved at step")
    waiting = status(checkout, run.name)
    assert waiting["stages"]["train"]["state"] in ("queued", "running")
    assert waiting["stages"]["export"]["state"] == "queued"
    slurm.wait(urgent, "COMPLETED", 60)
    assert finished(checkout, run)["state"] == "completed", log(run)

    assert steps(run) == 80
    assert [(r["step"], r["loss"]) for r in metrics.read_metrics(run.metrics_file)] == [
        (r["step"], r["loss"]) for r in metrics.read_metrics(whole.metrics_file)
    ]
    final = [checkpoint.folder_for(r.checkpoints, 80) / "adapter_model.safetensors" for r in (run, whole)]
    assert checkpoint.digest(final[0]) == checkpoint.digest(final[1])
    # Export waited for the second life's end.
    known = run.ledger()
    (trained,) = [ended for ended in known.of(Ended, "train") if ended.code == 0]
    (exported,) = known.of(Started, "export")
    assert exported.time > trained.time


@pytest.mark.parametrize("by", ["make cancel", "scancel"])
def test_a_cancelled_chain_ends_and_stays_ended(checkout: Path, slurm: Slurm, whole: RunDir, by: str) -> None:
    run = submit(checkout, "--new", settings="train.steps=5000")
    until(lambda: steps(run) > 5, 120, "5 steps")
    ids = [stage["job_id"] for stage in status(checkout, run.name)["stages"].values()]
    if by == "scancel":
        slurm.run(["scancel", ids[1]])
    else:
        done = jobs("cancel", "--run", run.name, checkout=checkout)
        assert done.returncode == 0, done.stderr
    assert finished(checkout, run, 60)["state"] == "cancelled"
    # Longer than any requeue would need to bring it back.
    time.sleep(12)
    assert not slurm.run(["squeue", "-h", "-j", ",".join(ids[1:])])
    assert status(checkout, run.name)["stages"]["train"]["state"] == "cancelled"
    assert not (run.lives / "train-2").exists() and not (run.lives / "export-1").exists()
