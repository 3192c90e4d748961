"""Two nodes of two ranks on a real Slurm: trained, preempted, out of time, resized, consolidated, evaluated."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from benchmarks.chaos.processes import workers
from ftlib import metrics
from ftlib.rundir import RunDir
from ftlib.runs.events import Resumed
from tests.cluster import Slurm
from tests.test_chain import finished, log, steps, until
from tests.wishes import jobs, run_names, status

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 90
SHORT = (
    f"train.steps={STEPS} resources.gpus_per_node=2 train.micro_batch=1 data.template=brief data.seq_len=128 "
    "data.pairs=200 evaluate.pairs=8 evaluate.max_new_tokens=8 cluster.qos=group-b cluster.cpu_qos=group"
)


def submitted(checkout: Path, slurm: Slurm, twin: str) -> RunDir:
    before = set(run_names(checkout))
    settings = f"{SHORT} cluster.scheduler.slurm_conf={slurm.env['SLURM_CONF']}"
    words = ["submit", "--model", twin, "--nodes", "2", "--cluster", "local-slurm", "--set", settings]
    done = jobs(*words, checkout=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = set(run_names(checkout)) - before
    return RunDir(checkout / "runs" / name)


def outcome(run: RunDir, life: int, timeout_s: float) -> str:
    file = run.outcomes / f"train-{life}"
    until(file.exists, timeout_s, f"the end of life {life}\n{log(run)}")
    return file.read_text()


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def warned(pid: int) -> bool:
    """Whether a stopped process has got SIGUSR2: it waits for it, or Slurm has woken it, too, and it is gone."""
    try:
        pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return True
    assert pending
    return bool(int(pending[1], 16) >> (signal.SIGUSR2 - 1) & 1)


@pytest.mark.parametrize("twin", ["tiny-zero3", pytest.param("tiny-zero2", marks=pytest.mark.nightly)])
def test_a_twin_lives_through_everything_and_ends_on_another_number_of_nodes(
    checkout: Path, slurm: Slurm, twin: str
) -> None:
    run = submitted(checkout, slurm, twin)
    until(lambda: steps(run) > 5, 180, f"5 steps\n{log(run)}")
    urgent = slurm.sbatch("--qos=group", "--nodes=3", "--gres=gpu:a100:2", "--output=/dev/null", "--wrap=sleep 2")
    assert outcome(run, 1, 30).startswith("75 interrupted (preemption), saved at step")
    slurm.wait(urgent, "COMPLETED", 60)
    seen = steps(run)
    until(lambda: steps(run) > seen + 5, 120, f"5 more steps\n{log(run)}")
    # It stands still until the warning before its time limit is there: a fast machine would be done by then.
    ranks = [worker.pid for worker in workers(run.path, "train", 2)]
    assert len(ranks) == 4
    signal_all(ranks, signal.SIGSTOP)
    job = status(checkout, run.name)["stages"]["train"]["job_id"]
    # The next whole minute but one: no limit that is over already, after which Slurm would not warn.
    limit_min = int(time.time() - run.ledger().attempts["train"][-1].began) // 60 + 2
    slurm.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={limit_min}"])
    until(lambda: warned(ranks[0]), 90, "the warning before the time limit")
    signal_all(ranks, signal.SIGCONT)
    assert outcome(run, 2, 30).startswith("75 interrupted (time limit), saved at step")

    refused = jobs("resume", "--run", run.name, "--nodes", "1", checkout=checkout)
    assert refused.returncode == 64 and "queued or running with the nodes it has. make cancel" in refused.stderr
    assert jobs("cancel", "--run", run.name, checkout=checkout).returncode == 0
    until(lambda: status(checkout, run.name)["stages"]["train"]["state"] == "cancelled", 60, "the cancelled training")
    done = jobs("resume", "--run", run.name, "--nodes", "1", checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert "micro-batch 1 x accumulation 4 x 2 GPUs, 8 rows a step as before" in done.stdout
    assert finished(checkout, run)["state"] == "completed", log(run)

    rows = [row for row in metrics.read_metrics(run.metrics_file) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["loss"] for row in rows[-10:]) < 0.8 * sum(row["loss"] for row in rows[:10])
    resumed = [event.step for event in run.ledger().of(Resumed)]
    assert len(resumed) >= 2 and resumed == sorted(resumed) and resumed[0] > 5
    assert "the checkpoint is of 4 GPUs (processes) and is rewritten for 2" in log(run)
    found = json.loads((run.export / "equality.json").read_text())
    assert found["passed"] and found["compared"] == "weights" and found["max_abs"] == 0.0
    assert json.loads(run.evaluation_file.read_text())["tuned"] and run.report_file.exists()
