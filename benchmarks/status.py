"""`make status` of thousands of tasks on the local Slurm, beside a bare squeue and sacct of the same jobs.
Array tasks are queued and held, and run folders made that name them, as a sweep of so many points would: by default
1,250 runs of four stages. Whole processes, in turn (A B C A B C …); status is asked anew each time."""

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
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lives import CONF, print_table, spread
from ftlib.rundir import STAGES
from ftlib.runs import events
from ftlib.sweep import SweepSpec
from ftlib.sweepdir import FOLDER, Sweep, SweepDir
from jobs import wish as wishes

GOAL_S = 1.0
PER_ARRAY = 1000  # the local Slurm's MaxArraySize allows no more
# The command line on another runs folder than the checkout's.
ELSEWHERE = """
import pathlib, sys
from jobs import wish
wish.RUNS = pathlib.Path(sys.argv[1])
from jobs.cli import main
sys.exit(main(sys.argv[2:]))
"""


def status(runs: Path, *words: str) -> list[str]:
    """The command that shows the status of the runs in `runs`."""
    return [sys.executable, "-c", ELSEWHERE, str(runs), "status", *words]


def make_runs(runs: Path, count: int, arrays: Sequence[dict[str, str]], *, conf: Path,
              sweep: str | None = None) -> list[str]:
    """`count` run folders, each PER_ARRAY of them queued as the tasks of one of `arrays` (stage -> array).
    sweep: the one that they are points of. Returns their names."""
    wish = wishes.make(
        model="tiny", data=None, cluster="local-slurm",
        settings=f"tracking.mode=disabled cluster.scheduler.slurm_conf={conf}")  # fmt: skip
    names = [f"tiny-{number:08x}" for number in range(count)]
    for index, name in enumerate(names):
        files = wishes.files_of(wish, name, sweep=sweep)
        files["provenance.json"]["checkout"] = str(runs.parent)
        for folder in ("slurm", "events", "outcomes", "lives"):
            (runs / name / folder).mkdir(parents=True)
        for file, value in files.items():
            (runs / name / file).write_text(json.dumps(value, indent=1))
        with (runs / name / "events" / "submit-login-1.jsonl").open("w") as file:
            for second, (stage, array) in enumerate(arrays[index // PER_ARRAY].items()):
                intended = events.Intended(stage=stage, nonce=f"nonce-{stage}")
                job = f"{array}_{index % PER_ARRAY}"
                submitted = events.Submitted(stage=stage, job_id=job, nonce=f"nonce-{stage}")
                for event in (intended, submitted):
                    row = events.to_row(event, f"2026-01-01T00:00:0{second}.000000+00:00")
                    file.write(json.dumps(row) + "\n")
    if sweep:
        spec = SweepSpec.model_validate({"grid": {"train.seed": list(range(count))}})
        points = {name: {"train.seed": seed} for seed, name in enumerate(names)}
        made = Sweep(spec=spec, said={"SWEEP": sweep}, points=points, profile=wish.profile, cache=wish.cache)
        SweepDir(runs / FOLDER / sweep).write(made)
    return names


def queued(count: int) -> list[dict[str, str]]:
    """Arrays of `count` held tasks in all for each stage, on the local Slurm."""
    return [{stage: _held(stage, min(PER_ARRAY, count - first)) for stage in STAGES}
            for first in range(0, count, PER_ARRAY)]  # fmt: skip


def _held(stage: str, tasks: int) -> str:
    command = ["sbatch", "--parsable", "--hold", "--account=lab", "--qos=group", f"--array=0-{tasks - 1}",
               f"--comment=ftlib bench {stage} nonce-{stage}", "--job-name=ftlib-bench-status", "--output=/dev/null",
               "--wrap", "true"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        subprocess.run(["scancel", "--me", "--name=ftlib-bench-status"], check=False)
        raise SystemExit(f"sbatch refused {tasks} tasks: {done.stderr.strip()}. Cancelled ones count for five minutes")
    return done.stdout.strip()


def counted(tools: Path) -> Path:
    """A folder for PATH whose squeue and sacct note each call in a file beside it, and are the real ones."""
    tools.mkdir()
    for name in ("squeue", "sacct"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} >>"{tools}.calls"\nexec {shutil.which(name)} "$@"\n')
        (tools / name).chmod(0o755)
    return tools


def seconds(command: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """Wall and CPU time of one process, which must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=wishes.CHECKOUT, env=env, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:3])} failed")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def measure(count: int, rounds: int) -> None:
    """Queue, measure, print, cancel."""
    arrays = queued(count)
    jobs = [job for stages in arrays for job in stages.values()]
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            for name, sweep in (("one by one", None), ("as a sweep", "bench")):
                make_runs(place / name / "runs", count, arrays, conf=CONF, sweep=sweep)
            tools = counted(place / "bin")
            env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
            commands = {
                "bare squeue": ["squeue", "--me", "--array", "--noheader", "--format=%i %T %r %k %S"],
                "bare sacct": ["sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State"],
                "status, runs one by one": status(place / "one by one/runs"),
                "status, runs of a sweep": status(place / "as a sweep/runs")}
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
            for round_ in range(rounds + 1):
                for name, command in commands.items():
                    value = seconds(command, env if "status" in name else None)
                    if round_:  # the first warms the page cache
                        taken[name].append(value)
            calls = Path(f"{tools}.calls").read_text().split()
    finally:
        subprocess.run(["scancel", "--me", "--name=ftlib-bench-status"], check=False)
    asked = len([name for name in commands if "status" in name]) * (rounds + 1)
    rows = [(name, *spread([wall for wall, _ in values], 3), spread([cpu for _, cpu in values], 3)[0])
            for name, values in taken.items()]  # fmt: skip
    title = f"{4 * count:,} tasks, {count:,} runs: median of {rounds} rounds"
    print_table(title, ("command", "seconds", "least", "most", "of it CPU"), rows)
    bare = [a + b for (a, _), (b, _) in zip(taken["bare squeue"], taken["bare sacct"], strict=True)]
    for name in ("status, runs one by one", "status, runs of a sweep"):
        ratio = statistics.median(wall / other for (wall, _), other in zip(taken[name], bare, strict=True))
        print(f"{name}: {ratio:.1f} times bare squeue + sacct, median within the rounds (goal: {GOAL_S:g} s)")
    print(f"calls a status: {calls.count('squeue') / asked:g} squeue, {calls.count('sacct') / asked:g} sacct")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=1250, help="runs, of four tasks each")
    options.add_argument("--rounds", type=int, default=5)
    said = options.parse_args()
    if not shutil.which("squeue") or not CONF.exists():
        print("not measured: `make cluster` starts a Slurm to measure it on")
        return
    os.environ["SLURM_CONF"] = str(CONF)
    measure(said.runs, said.rounds)


if __name__ == "__main__":
    main()
