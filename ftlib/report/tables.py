"""Tables for the terminal and for logs."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

SHARES = (("valid_json", "valid JSON"), ("function", "right function"), ("exact", "exact arguments"))
GROUP_WORDS = {"held-out": "held-out pairs", "unseen": "unseen functions"}


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(group, model, cells) for each line of an evaluation; cells: the SHARES, perplexity, n; a dash for null."""
    groups = {"held-out": {name: row for name, row in evaluation.items() if name != "unseen"}}
    groups |= {"unseen": evaluation["unseen"]} if "unseen" in evaluation else {}
    return [
        (group, name, [*(_percent(row[key]) for key, _ in SHARES), _number(row["perplexity"]), str(row["n"])])
        for group, rows in groups.items()
        for name, row in rows.items()]


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """evaluation.json as a table, a line a model, in sections for held-out pairs and for functions in no training."""
    table = Table(title="Evaluation", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("asked on")
    table.add_column("model")
    for _, heading in (*SHARES, ("", "perplexity"), ("", "pairs")):
        table.add_column(heading, justify="right")
    before = None
    for group, name, cells in evaluation_rows(evaluation):
        if before not in (None, group):
            table.add_section()
        style = "bold" if name == "tuned" else None
        table.add_row("" if group == before else GROUP_WORDS[group], name, *cells, style=style)
        before = group
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1e6 else f"{value:.2e}"
