"""Every method: two resumed halves beside the whole, byte for byte; and memory and speed of each tiny twin.

    python -m benchmarks.methods [--only WORD]

Each life is a process of its own, so that peak memory is that life's and a resume finds nothing in memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lives import CHECKOUT, prepared_run, print_table, sha
from ftlib import checkpoint
from ftlib.plan import numerics
from ftlib.rundir import RunDir

STEPS, HALF = 8, 4
SHORT = f"train.steps={STEPS} train.global_batch=4 train.micro_batch=2 tracking.mode=disabled evaluate.pairs=4 "
ADAPTERS = "method.train_layers=[] method.dropout=0.1 "
# A recipe and its SET for each method.
METHODS = {
    "qlora": ("tiny-llama3", ADAPTERS + "method.kind=qlora"), "lora": ("tiny-llama3", ADAPTERS + "method.kind=lora"),
    "lora, 8-bit base": ("tiny-llama3", ADAPTERS + "method.kind=lora method.base_bits=8"),
    "rslora and dora": ("tiny-llama3", ADAPTERS + "method.kind=lora method.rslora=true method.dora=true"),
    "qlora, new tokens": ("tiny-llama3", ADAPTERS + "method.kind=qlora tokens.add=[Instruction,Response]"),
    "full": ("tiny-llama3", "method.train_layers=[] method.kind=full"),
    "freeze": ("tiny-llama3", "method.kind=freeze method.train_layers=['1.mlp',lm_head]"),
    "prompt, random": ("tiny-llama3", "method.train_layers=[] method.kind=prompt method.prompt_tokens=8"),
    "prompt, from text": (
        "tiny-llama3",
        "method.train_layers=[] method.kind=prompt method.prompt_tokens=8 method.prompt_text='Answer the request'"),
    "two-stage": ("tiny-llama3", ADAPTERS + "method.kind=two-stage method.prompt_tokens=8 method.prompt_share=0.5"),
    "falcon, qlora": ("tiny-falcon", "")}
TWINS = ("tiny", "tiny-codellama", "tiny-alpaca", "tiny-llama3", "tiny-falcon")


def make_run(folder: Path, cache: Path, recipe: str, settings: str) -> RunDir:
    """A prepared run in `folder`, whose training on a CPU has one thread."""
    run = prepared_run(folder, settings, recipe=recipe, cache=cache)
    begun = run.numerics()
    if begun.stages["train"].device == "cpu":
        numerics.write(run.path, begun.model_copy(update={"threads": 1}))
    return run


def life(folder: Path, number: int, stop_after: int | None) -> None:
    """One life in this process, stopped after a step; prints its peak memory in MiB, the machine's and the GPU's."""
    import torch

    from ftlib.errors import Interrupted
    from ftlib.metrics import MetricsWriter
    from ftlib.stop import StopFlag
    from ftlib.train.run import train

    stop, append = StopFlag(), MetricsWriter.append

    def watched(self: MetricsWriter, **row: Any) -> None:
        append(self, **row)
        if row["step"] == stop_after and "loss" in row:
            stop.cause = "benchmark"

    MetricsWriter.append = watched  # type: ignore[method-assign]
    try:
        train(RunDir(folder), number, stop)
    except Interrupted as error:
        assert error.step == stop_after, error
    gpu = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, gpu)


def measure(root: Path, name: str, recipe: str, settings: str, *, halves: bool) -> list[str]:
    """A row: equal or not, peak memory of a whole life, tokens/s as the median of its later steps."""
    from ftlib.metrics import read_metrics

    whole = make_run(root / "whole" / "a-run", root / "cache", recipe, SHORT + settings)
    peak, _ = process(whole.path, 1, None)
    equal = ""
    if halves:
        halved = make_run(root / "halved" / "a-run", root / "cache", recipe, SHORT + settings)
        process(halved.path, 1, HALF)
        process(halved.path, 2, None)
        ends = [checkpoint.folder_for(run.checkpoints, STEPS) for run in (whole, halved)]
        equal = "yes" if sha(ends[0]) == sha(ends[1]) else "NO"
    speeds = [row["tokens_per_s"] for row in read_metrics(whole.metrics_file) if "loss" in row][2:]
    return [name, recipe, equal, f"{peak:,.0f}", f"{statistics.median(speeds):,.0f}"]


def process(folder: Path, number: int, stop_after: int | None) -> tuple[float, float]:
    """`life` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.methods", "--life", str(folder), str(number), str(stop_after or 0)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
    host, gpu = done.stdout.split()[-2:]
    return float(host), float(gpu)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="only rows whose name has this word")
    options.add_argument("--life", nargs=3, help=argparse.SUPPRESS)
    said = options.parse_args()
    if said.life:
        return life(Path(said.life[0]), int(said.life[1]), int(said.life[2]) or None)
    rows = [(name, *how, True) for name, how in METHODS.items()] + [("as it is", name, "", False) for name in TWINS]
    found = []
    for name, recipe, settings, halves in rows:
        if said.only in f"{name} {recipe}":
            with tempfile.TemporaryDirectory() as root:
                found.append(measure(Path(root), name, recipe, settings, halves=halves))
    columns = ("method", "recipe", "halves equal the whole", "peak MiB", "tokens/s")
    print_table(f"{STEPS} steps, one thread; halves: stopped after step {HALF}, resumed", columns, found, left=2)
    if any(row[2] == "NO" for row in found):
        raise SystemExit("a resumed run is not equal to the uninterrupted one")


if __name__ == "__main__":
    main()
