"""What the training stage measures, appended by each of its lives.

metrics.jsonl, a row per optimizer step and per validation:
    {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "life", "time"}
    {"step", "eval_loss", "life", "time"}
`tokens` are the real, non-padding tokens of the step over all ranks; `seconds` is the step alone, without saves and
validations.

gpu.jsonl and gpu-RANK.jsonl, a row per sample of one GPU:
    {"time", "life", "utilization" (%), "memory_gib", "power_w" (null where unknown)}
"""

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

GPU_EVERY_S = 5.0
GPU_IDLE_BELOW = 5  # % of the time in which some kernel ran
TAIL_BYTES = 16 * 1024
# Read as text: a day of samples is 2 MB a GPU, and is read at every look at the run.
_UTILIZATION = re.compile(rb'"utilization": (\d+)')


class MetricsWriter:
    """Appends rows; only rank 0 of the training stage makes one."""

    def __init__(self, path: Path, life: int) -> None:
        self._life = life
        self._file = path.open("a", encoding="utf-8", buffering=1)
        with path.open("rb") as file:  # A killed life may leave half a row; ours must not join it.
            file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if file.read() not in (b"", b"\n"):
                self._file.write("\n")

    def append(self, **row: float | int | None) -> None:
        """Write one row; `life` and `time` are added."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({**row, "life": self._life, "time": now}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flush and let go of the file."""
        self.sync()
        self._file.close()

    def sync(self) -> None:
        """Flush to storage: before a checkpoint is committed, so that no row before it can be missing."""
        self._file.flush()
        os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The run's rows in order of step, a step's own row before its validation row; empty without a file.
    Each life replaces what earlier lives wrote from its first step on, so no step is there twice, and a row of work
    that was lost and not yet done again is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = [row for row in map(_parsed, lines) if {"step", "life"} <= row.keys()]
    first: dict[int, int] = {}
    for row in rows:
        if "loss" in row:
            first[row["life"]] = min(row["step"], first.get(row["life"], row["step"]))
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["life"])):
        if not any(life > row["life"] and start <= row["step"] for life, start in first.items()):
            kept[row["step"], "eval_loss" in row] = row
    return [kept[key] for key in sorted(kept)]


def last_steps(path: Path) -> list[dict[str, Any]]:
    """The newest step rows of the life that wrote last, in order; some dozens, from the file's end alone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = [row for row in map(_parsed, lines) if {"step", "life", "loss", "time"} <= row.keys()]
    return [row for row in rows if row["life"] == rows[-1]["life"]]


def idle_gpu_hours(run: Path) -> float:
    """GPU-hours in which the run's GPUs did nothing, by their samples."""
    shares = (share for path in run.glob("gpu*.jsonl") for share in _UTILIZATION.findall(path.read_bytes()))
    return sum(int(share) < GPU_IDLE_BELOW for share in shares) * GPU_EVERY_S / 3600


def _parsed(line: str) -> dict[str, Any]:
    """One row; empty where a killed life left half of it."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
