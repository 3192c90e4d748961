"""The rows as Markdown, for the docs: what was checked, then the speeds, each table under what it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPEED = ("speed", "large")
COLUMNS = ("tokens/s", "GPU peak GiB", "planned GiB", "step s", "loss")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as tables; empty cells are what was not measured."""
    if not rows:
        return "Nothing was measured.\n"
    text = _heading(rows[-1])
    checks = [row for row in rows if row["group"] not in SPEED or not _is_speed(row)]
    text += "| group | check | status | what was found |\n|---|---|---|---|\n"
    for row in checks:
        text += f"| {row['group']} | {row['check']} | {row['status']} | {_cell(_findings(row))} |\n"
    measured = [row for row in rows if _is_speed(row)]
    if measured:
        text += f"\n| setting | {' | '.join(COLUMNS)} | status |\n|---|{'---:|' * len(COLUMNS)}---|\n"
        for row in measured:
            figures = (row["values"].get(column) for column in COLUMNS)
            shown = " | ".join("" if figure is None else f"{figure:,}" for figure in figures)
            status = row["status"] + (f": {_cell(row['reason'])[:120]}" if row["reason"] else "")
            text += f"| {row['check']} | {shown} | {status} |\n"
    return text


def _heading(row: dict[str, Any]) -> str:
    by = row["by"]
    packages = ", ".join(f"{name} {version}" for name, version in by.items() if name != "device" and version)
    dry = "**Dry: tiny sizes on a CPU; no figure below is a measurement of a GPU.** " if row["dry"] else ""
    return f"{dry}On {by['device']}: {packages}.\n\n"


def _is_speed(row: dict[str, Any]) -> bool:
    return row["group"] in SPEED and bool(row["values"].get("setting") or row["check"].startswith(("7B", "13B")))


def _findings(row: dict[str, Any]) -> str:
    values = {name: value for name, value in row["values"].items() if not isinstance(value, dict | list)}
    shown = ", ".join(f"{name} {value}" for name, value in values.items())
    return "; ".join(text for text in (row["reason"], shown) if text)[:400]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
