"""metrics.jsonl: a row per optimizer step and per validation, appended by each life of the training stage.

Step rows:        {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "life", "time"}
Validation rows:  {"step", "eval_loss", "life", "time"}

`tokens` are the real, non-padding tokens of the step over all ranks; `seconds` is the step alone, without
saves and validations.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends rows; only rank 0 of the training stage makes one."""

    def __init__(self, path: Path, life: int) -> None:
        self._life = life
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if not _ends_with_newline(path):  # A killed life may leave half a row; ours must not join it.
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


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The run's rows in order of step, a step's own row before its validation row; empty without a file.

    Each life replaces what earlier lives wrote from its first step on, so no step is there twice, and a row of
    work that was lost and not yet done again is left out.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "life"} <= row.keys():
            rows.append(row)
    first: dict[int, int] = {}
    for row in rows:
        if "loss" in row:
            first[row["life"]] = min(row["step"], first.get(row["life"], row["step"]))
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["life"])):
        if not any(life > row["life"] and start <= row["step"] for life, start in first.items()):
            kept[row["step"], "eval_loss" in row] = row
    return [kept[key] for key in sorted(kept)]
