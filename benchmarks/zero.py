"""Many processes: halves beside the whole, losses after a resize, and what a collective save and a consolidation cost.

    python -m benchmarks.zero [--only halves|cost] [--gib N]

Each process is one of its own, as under srun, on this machine's CPU; times are beside a bare, fsynced write of the same
bytes in the same folder, right after.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.lives import CHECKOUT, print_table, sha
from benchmarks.methods import make_run
from benchmarks.save import bare_write
from ftlib import atomic, checkpoint
from ftlib.metrics import read_metrics
from ftlib.plan import numerics
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved
from ftlib.runs.overrides import Overrides

STEPS, HALF = 25, 5
FLAVOURS = {"ZeRO 2": 2, "ZeRO 3": 3, "DDP": 0}
SHORT = (
    f"train.steps={STEPS} train.global_batch=4 train.micro_batch=1 data.template=brief data.seq_len=128 data.pairs=200 "
    "train.gradient_checkpointing=false optim.weight_decay=0.1 tracking.mode=disabled")
SAVES = 5


def live(run: RunDir, life: int, world: int, stop_after: int = 0) -> None:
    """One life of so many processes."""
    shared = numerics.stored(run.path).overridden(Overrides(nodes=world, micro_batch=1))
    numerics.write(run.path, shared)
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randint(10_000, 29_000))}
    command = [sys.executable, "-m", "benchmarks.methods", "--life", str(run.path), str(life), str(stop_after)]
    started = []
    for rank in range(world):
        names = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, **names}, **kept))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{' '.join(command)}\n{said[0][-3000:]}")


def losses(run: RunDir) -> list[float]:
    """Of every step."""
    return [row["loss"] for row in read_metrics(run.metrics_file) if "loss" in row]


def halves(root: Path) -> None:
    """For each kind and number of processes: are resumed halves the whole; how far are losses after a resize."""
    rows = []
    for flavour, stage in FLAVOURS.items():
        for world in (1, 2):
            place = root / f"{stage}-{world}"
            runs = {
                name: make_run(place / name / "a-run", root / "cache", "tiny-zero3", f"{SHORT} zero.stage={stage}")
                for name in ("whole", "halved")}
            live(runs["whole"], 1, world)
            live(runs["halved"], 1, world, HALF)
            shutil.copytree(runs["halved"].path, place / "resized" / "a-run")
            runs["resized"] = RunDir(place / "resized" / "a-run")
            live(runs["halved"], 2, world)
            live(runs["resized"], 2, 3 - world)
            ends = [(sha(checkpoint.committed(run.checkpoints)[0]), losses(run)) for run in runs.values()]
            equal = ends[0] == ends[1]
            far = max(abs(a - b) for a, b in zip(ends[0][1], ends[2][1], strict=True))
            rows.append((flavour, str(world), "yes" if equal else "NO", str(3 - world), f"{far:.1e}"))
    columns = ("", "processes", "halves equal the whole", "resumed with", "largest difference of a loss")
    print_table(f"{STEPS} steps in fp32, stopped after step {HALF}", columns, rows, left=2)


def write_base(folder: Path, gib: float) -> None:
    """A random Llama whose training state (12 bytes a parameter) has about so many GiB, with the tiny tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    tiny = CHECKOUT / "models" / "tiny-base"
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    hidden, layers = 768, max(1, round(gib * 2**30 / 12 / 7.08e6))
    set_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"], hidden_size=hidden, intermediate_size=4 * hidden // 2,
            num_hidden_layers=layers, num_attention_heads=12, tie_word_embeddings=True,
            bos_token_id=config.get("bos_token_id"), eos_token_id=config.get("eos_token_id"))
    ).save_pretrained(folder)  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder / file)


def cost(root: Path, gib: float) -> None:
    """Seconds a GiB of saves by two processes, and of a consolidation in fp32, beside bare writes."""
    import deepspeed.utils.zero_to_fp32  # noqa: F401 - seconds, which are no part of a consolidation

    from ftlib.export.weights import write_consolidated
    from ftlib.stop import StopFlag

    rows = []
    write_base(root / "base", gib)
    block = memoryview(os.urandom(64 << 20))
    for flavour, stage in list(FLAVOURS.items())[:2]:
        settings = f"{SHORT} zero.stage={stage} model.name={root / 'base'} train.steps={SAVES} train.save_every_steps=1"
        run = make_run(root / f"cost-{stage}" / "a-run", root / "cache", "tiny-zero3", settings)
        live(run, 1, 2)
        saves = [event.seconds for event in run.ledger().of(CheckpointSaved)][1:]
        newest = checkpoint.committed(run.checkpoints)[0]
        rows.append((f"{flavour}, a save", *_beside(root, newest, statistics.median(saves), block)))
        began = time.perf_counter()
        merged = root / f"merged-{stage}"
        write_consolidated(run.spec(), str(root / "base"), newest, merged, StopFlag())
        atomic.fsync_tree(merged)
        rows.append((f"{flavour}, consolidation", *_beside(root, merged, time.perf_counter() - began, block)))
        shutil.rmtree(run.path)
    columns = ("", "GiB", "s/GiB", "bare write s/GiB", "ratio")
    print_table(f"Two processes, about {gib:g} GiB of state; medians, seconds a GiB", columns, rows)


def _beside(root: Path, folder: Path, seconds: float, block: memoryview) -> list[str]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    gib = sum(sizes) / 2**30
    bare = statistics.median(bare_write(root / "bare", sizes, block) for _ in range(3))
    return [f"{gib:.2f}", f"{seconds / gib:.2f}", f"{bare / gib:.2f}", f"{seconds / bare:.2f}"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=("halves", "cost"))
    options.add_argument("--gib", type=float, default=1.0, help="size of the state whose save is timed")
    said = options.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name, measure in (("halves", lambda: halves(Path(root))), ("cost", lambda: cost(Path(root), said.gib))):
            if said.only in (None, name):
                measure()


if __name__ == "__main__":
    main()
