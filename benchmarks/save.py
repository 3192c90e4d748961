"""What a save costs: a training's checkpoint of about 1 GiB, beside a bare, fsynced write of the same bytes.
A real training of the tiny model with an adapter so wide that its state has that size. Each of its saves is followed by
the bare write of as many bytes, file by file, so that a disk whose speed drifts serves both alike."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lives import CHECKOUT, prepared_run, print_or_dump, print_table, spread
from ftlib import atomic, checkpoint
from ftlib.stop import StopFlag
from jobs import wish as wishes

# Until the first folders are deleted again, memory for the page cache is taken anew.
WARM = 3
GOAL = 1.2
STATE_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments


def rank_for(gib: float) -> int:
    """The adapter's rank at which the tiny model's training state has about `gib`."""
    from ftlib.plan import shapes

    config = json.loads((CHECKOUT / "models" / "tiny-base" / "config.json").read_text(encoding="utf-8"))
    return int(gib * 2**30 / STATE_BYTES_PER_PARAMETER / shapes.from_config(config, "tiny-base").lora_params(1))


def wait_until_quiet(most_s: float = 20.0) -> bool:
    """Wait until others leave the processors alone; False when they did not. Hashing needs a second processor."""
    end = time.monotonic() + most_s
    while time.monotonic() < end:
        before = psutil.cpu_times()
        time.sleep(0.5)
        after = psutil.cpu_times()
        busy = sum(after[:3]) - sum(before[:3])  # user, nice, system
        if busy < 0.1 * 0.5 * (psutil.cpu_count() or 1):
            return True
    return False


def bare_write(folder: Path, sizes: list[int], block: memoryview) -> float:
    """Seconds to write and flush files of these sizes, one after the other, and to flush their folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.perf_counter()
    for number, size in enumerate(sizes):
        with (folder / str(number)).open("wb", buffering=0) as file:
            left = size
            while left:
                left -= file.write(block[: min(left, len(block))])
            os.fsync(file.fileno())
    atomic.fsync(folder)
    taken = time.perf_counter() - began
    shutil.rmtree(folder)
    return taken


def measure(folder: Path, gib: float, saves: int) -> list[dict[str, Any]]:
    """One row per save: its bytes, seconds, and those of the bare write after it."""
    from ftlib.train import run as training
    from ftlib.train.trainer import FineTuner

    settings = (
        f"method.rank={rank_for(gib)} train.steps={saves + WARM} train.global_batch=1 train.save_every_steps=1 "
        "data.pairs=64 tracking.mode=disabled optim.warmup_share=0")
    run = prepared_run(folder / "a-run", settings)
    block, rows = memoryview(os.urandom(64 << 20)), []
    save = FineTuner.save

    def timed(self: FineTuner) -> None:
        if self.keeping.step == self.state.global_step:
            return
        os.sync()
        quiet = wait_until_quiet()
        began = time.perf_counter()
        save(self)
        seconds = time.perf_counter() - began
        newest = checkpoint.committed(run.checkpoints)[0]
        sizes = [path.stat().st_size for path in newest.iterdir()]
        os.sync()
        quiet = wait_until_quiet() and quiet
        bare = bare_write(folder / "bare", sizes, block)
        rows.append({"bytes": sum(sizes), "save_s": seconds, "bare_s": bare, "quiet": quiet})

    FineTuner.save = timed
    try:
        training.train(run, 1, StopFlag())
    finally:
        FineTuner.save = save
    return rows[WARM:]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and that of the ratio to the bare write just after; of pairs that began on a quiet machine, if any."""
    noisy = sum(not row["quiet"] for row in rows)
    rows = [row for row in rows if row["quiet"]] or rows
    save, bare = (statistics.median(row[name] for row in rows) for name in ("save_s", "bare_s"))
    ratio = statistics.median(row["save_s"] / row["bare_s"] for row in rows)
    gib = rows[0]["bytes"] / 2**30
    return {
        "gib": gib, "saves": len(rows), "save_s": save, "bare_s": bare, "ratio": ratio, "goal": GOAL, "noisy": noisy,
        "rows": rows}


def show(found: dict[str, Any]) -> None:
    names = (("bare, fsynced write", "bare_s"), ("committed checkpoint, every file hashed", "save_s"))
    rows = [(name, *spread([row[key] for row in found["rows"]])) for name, key in names]
    print_table(f"A save of {found['gib']:.2f} GiB, median of {found['saves']}", ("", "seconds", "least", "most"), rows)
    print(
        f"ratio, median of the pairs: {found['ratio']:.2f} (goal: at most {GOAL}); {found['noisy']} other pairs "
        "began while others kept the machine busy (left out, unless all did)")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gib", type=float, default=1.0, help="size of the state")
    options.add_argument("--saves", type=int, default=9)
    options.add_argument("--folder", type=Path, help="where to write, on the storage in question; default: runs/")
    options.add_argument("--json", action="store_true")
    said = options.parse_args()
    wishes.RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=said.folder or wishes.RUNS, prefix=".bench-") as folder:
        found = summary(measure(Path(folder), said.gib, said.saves))
    print_or_dump(found, said.json, show)


if __name__ == "__main__":
    main()
