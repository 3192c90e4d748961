"""Sweeps: submitting 1,000 points beside a loop of submitit, and the report of 1,000 points.

On the local Slurm, whose nodes are drained so that nothing starts (use it for nothing else meanwhile). Both run in
turn. The loop of submitit stops after 20 jobs of one stage each; its time for 1,000 is that of 20 times 50. Ours is the
whole command: 1,000 run folders and an array for every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.lives import CHECKOUT, CONF, print_table, spread
from ftlib.runs import events

ENV = {**os.environ, "SLURM_CONF": str(CONF)}
POINTS, LOOP = 1000, 20
SUBMITIT = """
import sys, time
from submitit import SlurmExecutor
executor = SlurmExecutor(sys.argv[1])
executor.update_parameters(partition="gpu", gpus_per_node=1, time=10)
began = time.perf_counter()
for number in range(int(sys.argv[2])):
    executor.submit(print, number)
print(time.perf_counter() - began)
"""


def say(*command: str) -> str:
    return subprocess.run(command, env=ENV, text=True, capture_output=True, check=True).stdout


def submit(checkout: Path) -> tuple[float, int]:
    """Seconds of `sweep` for POINTS points, as a whole process; and how often it called sbatch for a stage."""
    site = f"cluster.scheduler.slurm_conf={CONF} tracking.mode=disabled"
    words = ("sweep", "--sweep", "bench", "--cluster", "local-slurm", "--set", site)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *words], cwd=checkout, env=ENV, text=True, capture_output=True, check=True)
    taken = time.perf_counter() - began
    (place,) = (checkout / "runs" / "sweeps").iterdir()
    assert f"train {POINTS}" in done.stdout, done.stdout
    return taken, len(list((place / "arrays").glob("*/*_submission.sh")))


def loop(folder: Path) -> float:
    """Seconds of LOOP calls of submitit's submit, its import not counted."""
    done = subprocess.run(
        [sys.executable, "-c", SUBMITIT, str(folder), str(LOOP)], env=ENV, text=True, capture_output=True, check=True)
    return float(done.stdout)


def report(checkout: Path) -> float:
    """Seconds of `report` for POINTS points that have scores, table, CSV and plots included."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jobs", "report", "--sweep", "bench"], cwd=checkout, env=ENV, stdout=subprocess.DEVNULL,
        check=True)  # fmt: skip
    return time.perf_counter() - began


def give_scores(checkout: Path) -> None:
    """What an evaluated run has, in each run: scores, ends, and an hour of events a stage."""
    for number, run in enumerate(sorted((checkout / "runs").glob("*/spec.json"))):
        scores = {"perplexity": 1 + number / POINTS, "exact": 0.5, "function": 0.5, "valid_json": 1.0}
        (run.parent / "evaluation.json").write_text(json.dumps({"base": scores, "tuned": scores}))
        for stage in ("prepare", "train", "export", "evaluate"):
            (run.parent / "outcomes" / f"{stage}-1").write_text("0 done\n")
            began = events.Started(stage=stage, attempt=1, job_id="1")
            ended = events.Ended(stage=stage, attempt=1, code=0)
            rows = [
                events.to_row(began, "2026-01-01T00:00:00+00:00"),
                events.to_row(ended, "2026-01-01T01:00:00+00:00"),
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (run.parent / "events" / f"{stage}-1.jsonl").write_text(text)


def fresh(checkout: Path) -> None:
    """A copy of the checkout without runs, and a queue without jobs."""
    say("scancel", "--user", str(os.getuid()))
    if checkout.exists():
        shutil.rmtree(checkout / "runs", ignore_errors=True)
        return
    for name in ("ftlib", "jobs", "slurm_templates", "models", "env"):
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    grid = {"optim.lr": [f"{1 + i / 1000}e-4" for i in range(POINTS // 4)], "method.rank": [8, 12, 16, 24]}
    (checkout / "jobs" / "sweeps" / "bench.yaml").write_text(json.dumps({"grid": grid}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--times", type=int, default=5)
    times = options.parse_args().times
    if shutil.which("sbatch") is None or subprocess.run(["scontrol", "ping"], env=ENV, capture_output=True).returncode:
        print("sweep: not measured; `make cluster` starts a Slurm to measure it on")
        return
    ours, theirs, reports, calls = list[float](), list[float](), list[float](), set[int]()
    with tempfile.TemporaryDirectory() as place:
        checkout = Path(place) / "checkout"
        say("scontrol", "update", "NodeName=n[1-3]", "State=drain", "Reason=benchmark")
        try:
            for number in range(times):
                fresh(checkout)
                taken, count = submit(checkout)
                ours.append(taken)
                calls.add(count)
                theirs.append(loop(Path(place) / f"submitit-{number}") * POINTS / LOOP)
            give_scores(checkout)
            for _ in range(times):
                reports.append(report(checkout))
        finally:
            say("scancel", "--user", str(os.getuid()))
            say("scontrol", "update", "NodeName=n[1-3]", "State=resume")
    taken = {
        f"make sweep, {POINTS:,} points, run folders included": ours,
        f"a loop of submitit.submit, {LOOP} jobs, times {POINTS // LOOP}": theirs,
        f"make report, {POINTS:,} points": reports}
    rows = [(what, *spread(values)) for what, values in taken.items()]
    print_table(f"Medians of {times}, whole processes", ("what", "seconds", "least", "most"), rows)
    print(f"submitit's loop / ours: {statistics.median(theirs) / statistics.median(ours):.1f}; sbatch calls: {calls} "
          f"(prepare, train, export, evaluate, each ⌈n / MaxArraySize⌉)")  # fmt: skip


if __name__ == "__main__":
    main()
