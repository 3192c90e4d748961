"""A sweep's score over each swept field, drawn by matplotlib as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.sweep import Point

PANEL_INCHES = (4.0, 3.4)
PANELS_A_ROW = 3
# Lines with a name each, one per value of the other field; more would be a tangle.
MOST_LINES = 8
# Values this far apart are spread evenly by their logarithm.
LOG_SPAN = 20


def draw(stem: Path, title: str, metric: str, better: str, scored: Sequence[tuple[Point, float]]) -> list[Path]:
    """Write stem.png and stem.svg: a panel per field, with a dot per point and a ring around the best (the first).
    scored: (fields, score), the best first. Returns the files; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    fields = list(scored[0][0])
    columns = min(PANELS_A_ROW, len(fields))
    lines = -(-len(fields) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 0.4), layout="constrained")
    panels: list[Any] = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for field, panel in zip(fields, panels, strict=False):
        _panel(panel, field, fields, scored)
        panel.set_xlabel(field)
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(f"{metric} ({better})")
    for panel in panels[len(fields) :]:
        panel.set_axis_off()
    scores = [score for _, score in scored]
    if min(scores) > 0 and max(scores) / min(scores) > LOG_SPAN:
        panels[0].set_yscale("log")
    figure.suptitle(title, fontsize="medium")
    files = [stem.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def _panel(panel: Any, field: str, fields: list[str], scored: Sequence[tuple[Point, float]]) -> None:
    place = _axis(panel, [point[field] for point, _ in scored])
    others = [name for name in fields if name != field]
    groups = {_text(point[others[0]]) for point, _ in scored} if len(others) == 1 else set()
    if 1 < len(groups) <= MOST_LINES:
        for group in sorted(groups, key=_natural):
            rows = [(place(p[field]), s) for p, s in scored if _text(p[others[0]]) == group]
            panel.plot(*zip(*sorted(rows), strict=True), marker="o", markersize=4, linewidth=1.2, label=group)
        panel.legend(title=others[0], fontsize="x-small", title_fontsize="x-small")
    else:
        panel.scatter([place(point[field]) for point, _ in scored], [score for _, score in scored], s=14, alpha=0.6)
    best = scored[0]
    panel.plot(place(best[0][field]), best[1], "o", markersize=11, markerfacecolor="none", markeredgecolor="black")
    panel.grid(alpha=0.3)


def _axis(panel: Any, values: list[Any]) -> Any:
    """Prepare the horizontal axis; returns what turns a value into its place there."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and max(values) / min(values) >= LOG_SPAN:
            panel.set_xscale("log")
        elif len(set(values)) <= MOST_LINES:
            panel.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
        return lambda value: value
    names = sorted({_text(value) for value in values}, key=_natural)
    panel.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 8 else 0)
    return lambda value: names.index(_text(value))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(text: str) -> tuple[bool, float, str]:
    """Numbers by their size, then words."""
    try:
        return False, float(text), ""
    except ValueError:
        return True, 0.0, text
