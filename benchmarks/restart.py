"""From the signal to the first new step, without Slurm's own delay, beside bare Python that imports and loads.
A training of the tiny recipe is warned with SIGUSR2, saves, ends, and its next life is started at once; in turn with it
a bare process imports the same libraries and loads the same model, quantised, with its adapter."""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lives import environment, first_step, prepared_run, print_or_dump, print_table, start, steps_done
from ftlib.rundir import RunDir
from jobs import wish as wishes

GOAL = 1.2
STEPS_BETWEEN = 20
BARE = """
import sys
import torch
torch.set_num_threads(int(sys.argv[2]))
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from peft import LoraConfig, get_peft_model
quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map={"": "cpu"},
                                             attn_implementation="sdpa", quantization_config=quantised)
get_peft_model(model, LoraConfig(r=32, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM"))
print("loaded", flush=True)
"""


def bare(run: RunDir) -> float:
    """Seconds until a bare process has imported and loaded."""
    command = [sys.executable, "-c", BARE, run.provenance()["model_path"], str(run.numerics().threads)]
    began = time.time()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(run, 1)
    ) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line.strip() != "loaded":
            pass
        taken = time.time() - began
        process.kill()
    assert line, "the bare process failed"
    return taken


def rounds(run: RunDir, count: int) -> list[dict[str, float]]:
    """One row per interruption: its parts in seconds, and the bare process beside it."""
    found = []
    process = start(run, 1)
    first_step(run, 1, process)
    for life in range(2, count + 2):
        wanted = steps_done(run) + STEPS_BETWEEN
        while steps_done(run) < wanted:
            time.sleep(0.05)
        signalled = time.time()
        process.send_signal(signal.SIGUSR2)
        if process.wait() != 75:
            raise SystemExit(f"the training ended with {process.returncode}, not with 75")
        ended = time.time()
        process = start(run, life)
        event = first_step(run, life, process)
        # Stopped while the bare process runs: both shall have the machine alone.
        process.send_signal(signal.SIGSTOP)
        beside = bare(run)
        process.send_signal(signal.SIGCONT)
        found.append({"stop_s": ended - signalled, **event.parts_s, "ours_s": event.time - signalled, "bare_s": beside})
    process.kill()
    process.wait()
    return found


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the parts, and of the ratio within each round."""
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {**middle, "ratio": statistics.median(row["ours_s"] / row["bare_s"] for row in rows), "goal": GOAL,
            "rounds": len(rows), "rows": rows}  # fmt: skip


PARTS = {
    "stop_s": "signal → saved and ended", "imports_s": "process started → libraries imported",
    "check_s": "data mapped, checkpoint verified", "load_s": "base model and adapter loaded",
    "optimizer_s": "tracking, Trainer, optimizer restored", "first_step_s": "first new step",
    "ours_s": "signal → first new step", "bare_s": "bare python: imports + load"}


def show(found: dict[str, Any]) -> None:
    rows = [(words, f"{found[key]:.2f}", f"{found[key] / found['bare_s']:.2f}") for key, words in PARTS.items()]
    print_table(f"Median of {found['rounds']} interruptions", ("part", "seconds", "share of bare"), rows)
    print(f"ratio, median within the rounds: {found['ratio']:.2f} (goal: at most {GOAL})")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--settings", default="", help="more SET for the run, such as tracking.mode=disabled")
    options.add_argument("--json", action="store_true")
    said = options.parse_args()
    wishes.RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wishes.RUNS, prefix=".bench-") as folder:
        run = prepared_run(Path(folder) / "a-run", f"train.steps=100000 data.pairs=600 {said.settings}")
        found = summary(rounds(run, said.rounds))
    print_or_dump(found, said.json, show)


if __name__ == "__main__":
    main()
