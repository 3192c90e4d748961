"""Sweeps on a real Slurm: sixty quick points, one of which always fails, and six tiny models; both are preempted."""

from __future__ import annotations

import csv
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import metrics, state
from ftlib.rundir import RunDir
from ftlib.sweepdir import SweepDir
from tests.array_shims import quick_python
from tests.cluster import Slurm
from tests.wishes import copied_checkout, jobs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SHORT = (
    "train.steps=20 train.save_every_steps=5 data.pairs=300 evaluate.pairs=8 evaluate.max_new_tokens=8 "
    "tracking.mode=disabled"
)


class Swept:
    """A sweep of a checkout on the local cluster, whose GPU stages yield to others."""

    def __init__(self, checkout: Path, slurm: Slurm, text: str, settings: str) -> None:
        self.checkout, self.slurm = checkout, slurm
        (checkout / "jobs" / "sweeps" / "mine.yaml").write_text(text)
        site = f"cluster.scheduler.slurm_conf={slurm.env['SLURM_CONF']} cluster.qos=group-b cluster.cpu_qos=group"
        self.wish = ("--sweep", "mine", "--cluster", "local-slurm", "--set", f"{site} {settings}")
        self.out = self("sweep", *self.wish)
        (path,) = (checkout / "runs" / "sweeps").iterdir()
        self.place = SweepDir(path)

    def __call__(self, *words: str) -> str:
        done = jobs(*words, checkout=self.checkout, SLURM_CONF=self.slurm.env["SLURM_CONF"])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def left(self) -> list[str]:
        return self.slurm.run(["squeue", "-h", "-r", "-o", "%i %j %T %r"]).splitlines()

    def until(self, check: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not check():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n" + "\n".join(self.left())
            time.sleep(0.5)

    def preempt(self) -> None:
        """Take all GPUs for a few seconds."""
        words = ("--qos=group", "--nodes=3", "--gres=gpu:a100:2", "--output=/dev/null", "--wrap=sleep 2")
        self.slurm.wait(self.slurm.sbatch(*words), "COMPLETED", 90)

    def end(self, timeout_s: float) -> None:
        """Wait until nothing of it is queued or running."""
        self.until(lambda: not any("mine-" in line for line in self.left()), timeout_s, "the sweep's end")


def ended(runs: list[RunDir], stage: str) -> int:
    return sum(run.stage_done(stage) for run in runs)


def test_sixty_points_end_though_they_are_preempted_and_one_always_fails(slurm: Slurm, tmp_path: Path) -> None:
    checkout = copied_checkout(tmp_path)
    quick = quick_python(tmp_path)
    text = f"grid: {{train.seed: {list(range(60))}}}\nmetric: perplexity\n"
    # Not all have room at once: the feeder queues the rest.
    (tmp_path / "held").touch()
    swept = Swept(checkout, slurm, text, f"cluster.python={shlex.quote(str(quick))} cluster.scheduler.max_jobs=100")
    runs = swept.place.members()
    (runs[5].path / "fails").touch()
    (runs[2].path / "long").touch()
    (runs[7].path / "long").touch()
    (tmp_path / "held").unlink()
    assert len(runs) == 60 and "wait for room" in swept.out
    long = (runs[2].lives / "train-1", runs[7].lives / "train-1")
    swept.until(lambda: ended(runs, "train") > 6 and all(life.exists() for life in long), 120, "the first points' end")
    swept.preempt()
    swept.end(300)

    said = "\n".join(path.read_text() for path in (swept.place.path / "feeder").glob("*_log.out"))
    assert ended(runs, "evaluate") == 59, said
    # One that was preempted was requeued alone, and went on; the others had one life.
    again = [run for run in runs if (run.lives / "train-2").exists()]
    assert 2 <= len(again) <= 6 and {runs[2].name, runs[7].name} <= {run.name for run in again}
    assert all((run.outcomes / "train-1").read_text().startswith("75") for run in again)
    assert not (runs[5].lives / "train-2").exists() and not (runs[5].lives / "export-1").exists()
    assert "trying again would not help" in said
    # Each point's jobs are its own tasks, and its logs lie in its folder.
    for stage in ("train", "export", "evaluate"):
        assert len({run.ledger().jobs[stage] for run in runs}) == 60
    assert all(len(list((run.slurm / "train").glob("*_0_log.out"))) == 1 for run in runs)
    seen = json.loads(swept("status", "--sweep", "mine", "--json"))
    assert Counter(row["state"] for row in seen["runs"]) == {"completed": 59, "failed": 1}
    swept("report", "--sweep", "mine")
    rows = list(csv.DictReader(swept.place.csv_file.open()))
    scores = [float(row["perplexity"]) for row in rows[:59]]
    assert scores == sorted(scores) and rows[59]["state"] == "failed" and rows[59]["run"] == runs[5].name
    # Mended, it alone is queued again.
    (runs[5].path / "fails").unlink()
    assert "train 1 in 1 array" in swept("sweep", *swept.wish)
    swept.end(60)
    assert ended(runs, "evaluate") == 60


def test_six_tiny_models_preempted_in_training_share_one_dataset(slurm: Slurm, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    checkout = copied_checkout(tmp_path)
    text = "grid: {optim.lr: [1.0e-3, 4.0e-3], method.rank: [4, 8, 16]}\n"
    swept = Swept(checkout, slurm, text, SHORT)
    runs = swept.place.members()
    assert "prepare 1 in 1 array, train 6 in 1 array" in swept.out
    swept.until(lambda: any(len(metrics.read_metrics(run.metrics_file)) > 2 for run in runs), 240, "training")
    swept.preempt()
    swept.end(500)
    assert ended(runs, "evaluate") == 6, [state.stages(run.ledger(), {}) for run in runs]
    for run in runs:
        assert [row["step"] for row in metrics.read_metrics(run.metrics_file)] == list(range(1, 21))
        assert (run.export / "adapter" / "adapter_config.json").exists() and run.report_file.exists()
    assert any((run.lives / "train-2").exists() for run in runs)
    assert len({run.prepared()["digest"] for run in runs}) == 1
    assert sum((run.lives / "prepare-1").exists() for run in runs) == 1
    found = json.loads(swept("report", "--sweep", "mine", "--json"))
    assert [row["state"] for row in found] == ["completed"] * 6
    assert [row["perplexity"] for row in found] == sorted(row["perplexity"] for row in found)
    assert all(row["hours"] > 0 for row in found)
