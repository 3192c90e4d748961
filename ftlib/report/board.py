"""Status on a terminal: a line a run or sweep, as many columns as it is wide, and what there is to say below."""

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ftlib.report.plan import minutes
from ftlib.report.status import COLOURS, Row, SweepRow
from ftlib.slurm.queue import Answer

LEFT = ("run", "sweep", "stage", "state", "job")
# Where the line is too narrow these go, the first first.
DISPENSABLE = ("tokens/s", "wasted", "GPU-h", "lives", "loss", "left", "step")
GAP = "  "


def board(rows: Sequence[Row], sweeps: Sequence[SweepRow], answer: Answer, *, width: int) -> RenderableType:
    """All sweeps, then all runs; the stages, too, of a run that stands alone. `width` in characters."""
    parts: list[RenderableType] = []
    if sweeps:
        parts += _table([(_sweep_cells(sweep), [sweep.words]) for sweep in sweeps], width)
    if sweeps and rows:
        parts.append(Text())
    if rows:
        parts += _table([(_cells(row), _said(row)) for row in rows], width)
    if len(rows) == 1 and not sweeps:
        parts += [Text(), *_table([(_stage_cells(name, told), []) for name, told in rows[0].stages.items()], width)]
    age_s = time.time() - answer.asked
    when = f" (as Slurm said {minutes(age_s / 60)} ago)" if answer.asked and age_s >= 1 else ""
    if answer.trouble:
        parts += [Text(), Text(f"{answer.trouble}{when or '; shown is what the run folders tell'}", style="red")]
    elif when:
        parts += [Text(when.strip(), style="dim")]
    return Group(*parts)


def _cells(row: Row) -> dict[str, str]:
    return {
        "run": row.run, "state": row.state, "stage": row.stage or "",
        "step": "" if row.step is None else f"{row.step}/{row.steps}",
        "loss": "" if row.loss is None else f"{row.loss:.3f}",
        "tokens/s": "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "left": "" if row.left_s is None else minutes(row.left_s / 60), "lives": str(row.lives) if row.lives else "",
        **_spent(row)}


def _sweep_cells(row: SweepRow) -> dict[str, str]:
    counts = ", ".join(f"{count:,} {state}" for state, count in row.states.items())
    return {"sweep": row.sweep, "state": counts, "lives": str(row.lives) if row.lives else "", **_spent(row)}


def _spent(row: Row | SweepRow) -> dict[str, str]:
    if not row.gpu_hours:
        return {}
    wasted = min(row.gpu_hours, row.lost_gpu_hours + row.idle_gpu_hours)
    return {"GPU-h": f"{row.gpu_hours:,.2f}", "wasted": f"{wasted:,.2f}"}


def _stage_cells(name: str, told: dict[str, object]) -> dict[str, str]:
    return {"stage": name, "state": str(told["state"]), "job": str(told["job_id"] or ""), "lives": str(told["lives"])}


def _said(row: Row) -> list[str]:
    ended = ", ".join(f"{cause} × {count}" if count > 1 else cause for cause, count in row.causes.items())
    return [row.words, f"lives that ended early: {ended}" if ended else "", *row.notes]


def _table(rows: Sequence[tuple[dict[str, str], list[str]]], width: int) -> list[RenderableType]:
    columns = {}
    for name in dict.fromkeys(name for cells, _ in rows for name in cells):
        if size := max(len(cells.get(name, "")) for cells, _ in rows):
            columns[name] = max(len(name), size)
    for name in DISPENSABLE:
        if sum(columns.values()) + len(GAP) * (len(columns) - 1) > width:
            columns.pop(name, None)
    lines: list[RenderableType] = [Text(_line(dict(zip(columns, columns, strict=True)), columns), "bold")]
    for cells, said in rows:
        line = Text(_line(cells, columns))
        for state, colour in COLOURS.items():
            if state in cells.get("state", ""):
                line.highlight_words([state], colour)
        lines.append(line)
        lines += [Padding(Text(text, "dim"), (0, 0, 0, 4), expand=False) for text in said if text]
    return lines


def _line(cells: dict[str, str], columns: dict[str, int]) -> str:
    sides = (f"{cells.get(name, ''):{'<' if name in LEFT else '>'}{size}}" for name, size in columns.items())
    return GAP.join(sides).rstrip()
