"""Runs and their stages as a table."""

from __future__ import annotations

import datetime

from rich.table import Table

from ftlib import events, metrics
from ftlib.report.cost import stage_costs
from ftlib.report.plan import console
from ftlib.rundir import STAGES, RunDir
from ftlib.state import StageState, overall

COLOURS = {"completed": "green", "running": "cyan", "queued": "yellow", "failed": "red", "cancelled": "magenta"}


def print_status(runs: list[RunDir], found: dict[str, dict[str, StageState]]) -> None:
    """One row a run: its state, each stage's, the training's progress, and why it waits or ended."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("run", "state", *STAGES, "step", "loss", "GPU-h", "lost", ""):
        table.add_column(column, overflow="fold")
    for run in runs:
        stages = found[run.name]
        now = overall(stages)
        rows = [row for row in metrics.read_metrics(run.metrics_file) if "loss" in row]
        last = rows[-1] if rows else None
        words = next((s.words for s in stages.values() if s.state not in ("completed", "running") and s.words), "")
        table.add_row(
            run.name,
            f"[{COLOURS[now]}]{now}[/]",
            *(f"[{COLOURS[s.state]}]{s.state}[/]" + (f" ({s.lives})" if s.lives > 1 else "") for s in stages.values()),
            f"{last['step']}/{run.plan()['steps']}" if last else "",
            f"{last['loss']:.3f}" if last else "",
            *_gpu_hours(run),
            words,
        )
    console().print(table)


def _gpu_hours(run: RunDir) -> tuple[str, str]:
    """GPU-hours used, and those of work that was lost; blank where no GPU computes."""
    plan = run.plan()
    if plan["device"] != "cuda":
        return "", ""
    costs = stage_costs(events.read(run.events), plan, datetime.datetime.now(datetime.timezone.utc))
    return f"{sum(c.gpu_hours for c in costs):.2f}", f"{sum(c.lost_gpu_hours for c in costs):.2f}"
