"""A sweep's points by their score: rows, terminal table, CSV."""

import csv
import io
import json
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ftlib import atomic
from ftlib.errors import Unreadable
from ftlib.report.cost import stage_costs
from ftlib.report.plan import console
from ftlib.report.status import COLOURS, UNREADABLE
from ftlib.rundir import RunDir, is_run, reading
from ftlib.state import StageState, overall
from ftlib.sweep import METRICS, Point
from ftlib.sweepdir import Sweep, SweepDir

# Rows of a terminal's table; the CSV has all.
SHOWN = 40


@dataclass(frozen=True)
class Row:
    """One point: its scores (None: not there), and what it cost so far."""

    run: str
    fields: Point
    state: str
    scores: dict[str, float | None]
    gpu_hours: float
    hours: float  # of wall time, over its own stages and lives
    words: str  # why it failed or waits

    def as_json(self) -> dict[str, Any]:
        """Flat, as a line of the CSV."""
        cost = {"gpu_hours": round(self.gpu_hours, 4), "hours": round(self.hours, 4)}
        return {"run": self.run, "state": self.state, **self.fields, **self.scores, **cost, "words": self.words}


def rows(sweep: SweepDir, found: dict[str, dict[str, StageState]]) -> list[Row]:
    """All points, the best first and those without a score last; `found`: stages of the runs that are not evaluated."""
    kept, now = sweep.read(), time.time()
    made = [
        _row_or_damage(RunDir(sweep.runs / name), point, found.get(name), now) for name, point in kept.points.items()
    ]
    sign = -1 if METRICS[kept.spec.metric] else 1

    def order(row: Row) -> tuple[bool, float]:
        score = row.scores[kept.spec.metric]
        return score is None, 0.0 if score is None else sign * score

    return sorted(made, key=order)


def _row_or_damage(run: RunDir, point: Point, stages: dict[str, StageState] | None, now: float) -> Row:
    try:
        with reading(run.path):
            return _row(run, point, stages, now)
    except Unreadable as error:
        return Row(run.name, point, UNREADABLE, dict.fromkeys(METRICS), 0.0, 0.0, str(error))


def _row(run: RunDir, point: Point, stages: dict[str, StageState] | None, now: float) -> Row:
    scores: dict[str, float | None] = dict.fromkeys(METRICS)
    state = overall(stages) if stages else "unknown"
    if not is_run(run.path):
        return Row(run.name, point, "gone", scores, 0.0, 0.0, "its folder is not there any more; make sweep makes it")
    try:
        tuned = json.loads(run.evaluation_file.read_text(encoding="utf-8"))["tuned"]
        scores, state = {name: tuned.get(name) for name in METRICS}, "completed"
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        return Row(run.name, point, "failed", scores, 0.0, 0.0, f"{run.evaluation_file} cannot be read")
    known = run.ledger()
    costs = stage_costs(known, run.plan(), now)
    gpu_hours, hours = sum(cost.gpu_hours for cost in costs), sum(cost.seconds for cost in costs) / 3600
    told = [(s.state, s.words) for s in (stages or {}).values() if s.words]
    words = next((words for state in ("failed", "queued") for its, words in told if its == state), "")
    return Row(run.name, point, state, scores, gpu_hours, hours, words)


def print_rows(sweep: SweepDir, found: list[Row]) -> None:
    """The table, how many are in which state, what all cost, and how to get the best one again."""
    kept, out = sweep.read(), console()
    metric, fields = kept.spec.metric, kept.spec.fields
    with_gpu = any(row.gpu_hours for row in found)
    others = [name for name in METRICS if name != metric and any(row.scores[name] is not None for row in found)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in (*fields, f"{metric} {'↑' if METRICS[metric] else '↓'}", *others, "GPU-h" if with_gpu else "hours"):
        table.add_column(column, justify="right", overflow="fold")
    for column in ("state", "run", ""):
        table.add_column(column, overflow="fold")
    for number, row in enumerate(found[:SHOWN], 1):
        scores = [_number(row.scores[name]) for name in (metric, *others)]
        cost = f"{row.gpu_hours if with_gpu else row.hours:.2f}"
        state = Text(row.state, COLOURS.get(row.state, "red"))
        table.add_row(str(number), *map(str, row.fields.values()), *scores, cost, state, row.run, row.words)
    out.print(table)
    if len(found) > SHOWN:
        out.print(f"… and {len(found) - SHOWN} more; all are in {sweep.csv_file.name}")
    states = ", ".join(f"{count} {state}" for state, count in Counter(row.state for row in found).items())
    gpus = f"{sum(row.gpu_hours for row in found):.1f} GPU-hours, " if with_gpu else ""
    out.print(f"{len(found)} points: {states}; {gpus}{sum(row.hours for row in found):.1f} h of work")
    if found and found[0].scores[metric] is not None:
        out.print(f"The best again: {_again(kept, found[0])}", soft_wrap=True)


def _again(kept: Sweep, row: Row) -> str:
    """The command that submits a point alone: the same wish, and so the same run."""
    point = [f"{field}={json.dumps(value)}".replace('"', "'") for field, value in row.fields.items()]
    said = {**kept.said, "SET": " ".join(filter(None, [kept.said.get("SET", ""), *point]))}
    return "make submit " + " ".join(f"{name}={shlex.quote(value)}" for name, value in said.items() if name != "SWEEP")


def write_csv(file: Path, found: list[Row]) -> None:
    """Every row, the best first."""
    text, lines = io.StringIO(), [row.as_json() for row in found]
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["run"])
    writer.writeheader()
    writer.writerows(lines)
    atomic.write_text(file, text.getvalue())


def draw(sweep: SweepDir, found: list[Row]) -> list[Path]:
    """The score over each swept field, as PNG and SVG; nothing where no point has one, or matplotlib is not there."""
    metric = sweep.read().spec.metric
    scored = [(row.fields, score) for row in found if (score := row.scores[metric]) is not None]
    if not scored:
        return []
    try:
        from ftlib.report import plot

        title = f"{sweep.name}: {len(scored)} of {len(found)} points"
        better = "more is better" if METRICS[metric] else "less is better"
        return plot.draw(sweep.path / "report", title, metric, better, scored)
    except ImportError:
        console().print("No plot: matplotlib is not installed (it needs Python 3.11)")
        return []


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
