"""Every method: two resumed halves beside the whole, byte for byte; and memory and speed of each tiny twin.

    python -m benchmarks.methods [--only WORD]

Each life is a process of its own, so that peak memory is that life's and a resume finds nothing in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CHECKOUT = Path(__file__).resolve().parent.parent
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


def make_run(folder: Path, cache: Path, recipe: str, settings: str) -> Any:
    """A prepared run in `folder` (a run of the same name elsewhere is the same run)."""
    from ftlib.data.prepare import prepare
    from ftlib.rundir import RunDir
    from ftlib.stop import StopFlag
    from jobs import wish as wishes

    wish = wishes.make(model=recipe, data=None, cluster="local", settings=settings)
    run = RunDir(folder)
    run.checkpoints.mkdir(parents=True)
    for name, values in wishes.files_of(wish, folder.name).items():
        (folder / name).write_text(json.dumps(values))
    run.provenance_file.write_text(json.dumps({**run.provenance(), "cache": str(cache)}))
    if run.plan()["device"] == "cpu":
        run.plan_file.write_text(json.dumps({**run.plan(), "threads": 1}))
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(run, StopFlag())
    return run


def sha(run: Any, step: int) -> str:
    """Of all weights' bytes and all of the optimizer's state (its file may share tensors in another way)."""
    import torch

    from ftlib import checkpoint

    folder = checkpoint.folder_for(run.checkpoints, step)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))))
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    for number, values in sorted(state["state"].items()):
        for name, value in sorted(values.items()):
            if torch.is_tensor(value):
                value = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(repr((number, name, value)).encode())
    return digest.hexdigest()


def life(folder: Path, number: int, stop_after: int | None) -> None:
    """One life in this process, stopped after a step; prints its peak memory in MiB, the machine's and the GPU's."""
    import torch

    from ftlib.errors import Interrupted
    from ftlib.metrics import MetricsWriter
    from ftlib.rundir import RunDir
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
        equal = "yes" if sha(whole, STEPS) == sha(halved, STEPS) else "NO"
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
    table = Table(title=f"{STEPS} steps, one thread; halves: stopped after step {HALF}, resumed", box=None)
    for column in ("method", "recipe", "halves equal the whole", "peak MiB", "tokens/s"):
        table.add_column(column, justify="left" if column in ("method", "recipe") else "right")
    rows = [(name, *how, True) for name, how in METHODS.items()] + [("as it is", name, "", False) for name in TWINS]
    unequal = False
    for name, recipe, settings, halves in rows:
        if said.only not in f"{name} {recipe}":
            continue
        with tempfile.TemporaryDirectory() as root:
            row = measure(Path(root), name, recipe, settings, halves=halves)
        unequal |= row[2] == "NO"
        table.add_row(*row)
    Console(width=110).print(table)
    if unequal:
        raise SystemExit("a resumed run is not equal to the uninterrupted one")


if __name__ == "__main__":
    main()
