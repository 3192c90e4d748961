"""The two numbers of a run's numerics that the decisions need, read without anything but the standard library.

The whole is ftlib/plan/numerics.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUMERICS, PLAN = "numerics.json", "plan.json"


def batch(run: Path, nodes: int | None) -> tuple[int | None, int | None]:
    """(rows of a micro-batch as planned, rows of each rank in an optimizer step); None where nothing is planned yet.

    nodes: the training's nodes now, where they are others than those it was planned for.
    """
    stored = _read(run / NUMERICS)
    planned_nodes = stored.get("nodes")
    if not stored:  # a run of the first release
        stored = _read(run / PLAN)
        planned_nodes = ((stored.get("stages") or {}).get("train") or {}).get("nodes")
    micro_batch, accumulation = stored.get("micro_batch"), stored.get("accumulation")
    if not isinstance(micro_batch, int) or not isinstance(accumulation, int):
        return None, None
    rows = micro_batch * accumulation
    if nodes and planned_nodes:
        rows = rows * planned_nodes // nodes
    return micro_batch, rows


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
