"""How long the login node's commands take, beside importing the Trainer and beside a bare sbatch.
Whole processes, started in turn (A B C A B C …), so that a machine whose speed drifts slows them alike."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time

from benchmarks.lives import CHECKOUT, CONF, print_table, spread


def commands() -> dict[str, list[str]]:
    """What is timed: name -> argument list."""
    jobs = [sys.executable, "-m", "jobs"]
    found = {
        "submit --dry-run": [*jobs, "submit", "--model", "llama2-7b", "--cluster", "a100", "--dry-run"],
        "plan": [*jobs, "plan", "--model", "llama2-7b", "--cluster", "a100"], "status": [*jobs, "status"],
        "python -c pass": [sys.executable, "-c", "pass"],
        "from transformers import Trainer": [sys.executable, "-c", "from transformers import Trainer"]}
    if shutil.which("sbatch") and CONF.exists():
        found["bare sbatch"] = ["sbatch", "--output=/dev/null", "--wrap", "true"]
    return found


def seconds(command: list[str]) -> float:
    """Wall time of one process; it must succeed."""
    environment = {**os.environ, "SLURM_CONF": str(CONF)} if command[0] == "sbatch" else None
    began = time.perf_counter()
    subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=7)
    runs = options.parse_args().runs
    timed = commands()
    for command in timed.values():
        seconds(command)  # warm the page cache
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(runs):
        for name, command in timed.items():
            taken[name].append(seconds(command))
    trainer = statistics.median(taken["from transformers import Trainer"])
    columns = ("command", "seconds", "least", "most", "share of importing the Trainer")
    rows = [(name, *spread(values, 3), f"{statistics.median(values) / trainer:.3f}") for name, values in taken.items()]
    print_table(f"Median of {runs} runs, whole process", columns, rows)
    if "bare sbatch" not in timed:
        print("bare sbatch: not measured; `make cluster` starts a Slurm to measure it on")


if __name__ == "__main__":
    main()
