"""The results as a page: kinds × places, then every kill."""

from __future__ import annotations

import os
import platform

from benchmarks.chaos.campaign import FLAVOURS, ORDER, SETTINGS, UNKNOWN, Kill, Result
from benchmarks.chaos.kinds import KINDS


def markdown(results: list[Result], left: int, *, minutes: float, seed: int) -> str:
    """The page."""
    kills = [kill for result in results for kill in result.kills]
    equal = {result.run for result in results if result.equal}
    places = list(dict.fromkeys(place for _, place in ORDER))
    cells = [["kind \\ place", *places, "sum"]]
    for kind in KINDS:
        mine = [kill for kill in kills if kill.kind == kind]
        cells.append([kind, *(_cell([k for k in mine if k.place == place], equal) for place in places), str(len(mine))])
    totals = [str(sum(kill.place == place for kill in kills)) for place in places]
    cells.append(["sum", *totals, str(len(kills))])
    warned = [kill for kill in kills if KINDS[kill.kind].warned]
    hard = [kill for kill in kills if not KINDS[kill.kind].warned]
    head = [
        "# Killed in every way, at every place",
        "",
        "Made by `make chaos` (`python -m benchmarks.chaos --write docs/chaos.md`); do not edit.",
        "",
        f"{len(kills)} kills in {len(results)} run{'s' * (len(results) != 1)} on the local Slurm "
        f"({os.cpu_count()} cores, {platform.machine()}), "
        f"in {minutes:.0f} minutes, seed {seed}. Each run was then laid beside one of its kind that nothing touched: "
        "every step's loss, validation loss, learning rate, gradient norm and token count (by which the order of the "
        "samples shows), the exported adapter's and merged weights' SHA-256, the proof of their equality, every answer "
        "and the scores must be the same, no step twice, none missing.",
        "",
        f"- Runs that ended equal, bit for bit: **{len(equal)} of {len(results)}**",
        f"- Causes that `make why` named rightly, or called unknown: "
        f"**{sum(kill.right for kill in kills)} of {len(kills)}** ({_count_unknown(kills)} unknown)",
        f"- Steps done twice after a warning: **{sum(kill.lost for kill in warned)}** in {len(warned)} kills; after a "
        f"kill without one: {sum(kill.lost for kill in hard)} in {len(hard)} (a save every ten steps)",
        f"- From the kill to the next life's start: {_middle([kill.away_s for kill in kills]):.0f} s in the middle; "
        "most of it is Slurm's wait before it starts a requeued job",
    ]
    if left:
        head.append(f"- **Not done: {left} kills**, because the run was past their place")
    return "\n".join(
        [
            *head,
            "",
            "A cell: kills there; = all runs ended equal and no cause was wrong, ? one of them unknown, ≠ otherwise.",
            "",
            *_table(cells),
            "",
            "## Runs",
            "",
            *_table(_runs(results)),
            "",
            "## Kills",
            "",
            *_table(_kills(kills)),
            "",
            f"Settings: `MODEL=tiny SET=\"{SETTINGS}\"`, "
            + "; ".join(f"{name}: also `{more}`" for name, more in FLAVOURS.items() if more),
            "",
        ]
    )


def _cell(kills: list[Kill], equal: set[str]) -> str:
    if not kills:
        return "·"
    if not all(kill.run in equal and kill.right for kill in kills):
        return f"{len(kills)} ≠"
    return f"{len(kills)} {'?' if _count_unknown(kills) else '='}"


def _count_unknown(kills: list[Kill]) -> int:
    return sum(kill.cause == UNKNOWN for kill in kills)


def _runs(results: list[Result]) -> list[list[str]]:
    rows = [["run", "what", "kills", "lives", "ended", "result"]]
    for number, result in enumerate(results, 1):
        same = "equal" if result.equal else "; ".join(result.differences) or "not compared"
        rows.append([str(number), result.flavour, str(len(result.kills)), str(result.lives), result.state, same])
    return rows


def _kills(kills: list[Kill]) -> list[list[str]]:
    rows = [["run", "kind", "place", "life", "at step", "steps lost", "cause named"]]
    numbers = {name: str(n) for n, name in enumerate(dict.fromkeys(kill.run for kill in kills), 1)}
    for kill in kills:
        train = kill.stage == "train"
        named = kill.cause if kill.right else f"**{kill.cause}**"
        step, lost = (str(kill.at_step), str(kill.lost)) if train else ("", "")
        rows.append([numbers[kill.run], kill.kind, kill.place, f"{kill.stage} {kill.life}", step, lost, named])
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
