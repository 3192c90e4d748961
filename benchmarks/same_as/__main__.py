"""The command: run every case in both trees, print what is equal, what differs on purpose, and what just differs."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.same_as import cases as all_cases
from benchmarks.same_as import trees
from benchmarks.same_as.cases import Case, Training
from benchmarks.same_as.compare import (
    IntendedChanges,
    Line,
    PartResult,
    compare,
    failed_alike,
    no_longer_there,
    read_intended,
)
from benchmarks.same_as.results import Parts

FIRST_RELEASE = "e3be524"
# Of a long difference.
LINES_SHOWN = 40


@dataclass(frozen=True)
class Side:
    """One of the two trees."""

    name: str
    tree: Path


def main() -> int:
    """Exit code 0: nothing differs but what intended.yaml names."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.same_as", description=__doc__)
    options.add_argument(
        "--commit", default=FIRST_RELEASE, help="what this tree is compared with (default: %(default)s)"
    )
    options.add_argument("--only", default="", metavar="WORD", help="only the cases whose name has this word")
    options.add_argument("--keep", action="store_true", help="keep the two trees and their runs")
    chosen = options.parse_args()
    began = time.monotonic()
    intended = read_intended()
    root = Path(tempfile.mkdtemp(prefix="ftlib-same-as-"))
    try:
        results = _results(root, chosen.commit, chosen.only, intended)
    except trees.Trouble as trouble:
        print(f"same-as: {trouble}\nThe trees are in {root}", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - began) / 60
    _print_results(results, chosen.commit, minutes)
    if not chosen.only:
        for words in no_longer_there(results, intended):
            print(f"Intended, but not found (take it out of intended.yaml): {words}")
    wrong = any(result.wrong for result in results)
    if chosen.keep:
        print(f"The trees and their runs are in {root}")
    else:
        shutil.rmtree(root)
    return 1 if wrong else 0


def _results(root: Path, commit: str, only: str, intended: IntendedChanges) -> list[PartResult]:
    """Every chosen case's parts, compared; the slow cases are begun first."""
    then, now = Side("then", root / "then"), Side("now ", root / "now")
    trees.export_commit(commit, then.tree)
    trees.export_this_tree(now.tree)
    samples = shutil.copytree(now.tree / "samples", root / "samples")
    recipes = sorted(path.stem for path in (now.tree / "jobs" / "recipes").glob("*.yaml"))
    cases = [case for case in [*all_cases.trainings(), *all_cases.dry_runs(recipes, samples)] if only in case.name]
    if not cases:
        raise trees.Trouble(f"--only: no case has {only!r} in its name")
    cpus = trees.Cpus()
    started = {case: (_start(cpus, root, then, case), _start(cpus, root, now, case)) for case in cases}
    results = []
    try:
        for case, (of_then, of_now) in started.items():
            parts_then, parts_now = of_then.result(), of_now.result()
            results += compare(case.name, parts_then, parts_now, intended)
            if isinstance(case, Training) and parts_then["exit code"] == parts_now["exit code"] != 0:
                results.append(failed_alike(case.name, parts_now["exit code"]))
    finally:
        cpus.cancel()
    return results


def _start(cpus: trees.Cpus, root: Path, side: Side, case: Case) -> Future[Parts]:
    def parts(cpu: int) -> Parts:
        began = time.monotonic()
        if isinstance(case, Training):
            # Runs and caches of its own.
            tree = trees.copy_of(side.tree, root / "runs" / case.name / side.tree.name)
        else:
            tree = side.tree
        found = case.parts(tree, cpu)
        print(f"{side.name}  {case.name}  {time.monotonic() - began:.0f} s", flush=True)
        return found

    return cpus.submit(parts)


def _print_results(results: list[PartResult], commit: str, minutes: float) -> None:
    """A row for each case, then every unintended difference, line by line."""
    console = Console(width=max(110, Console().width))
    table = Table(title=f"This tree beside {commit}, in {minutes:.0f} minutes", box=None)
    for column in ("case", "equal parts", "changed on purpose", "DIFFERENT"):
        table.add_column(column, overflow="fold")
    by_case: dict[str, list[PartResult]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    for case, parts in by_case.items():
        equal = sum(not part.lines for part in parts)
        meant = [part.part for part in parts if part.lines and not part.wrong]
        wrong = [part.part for part in parts if part.wrong]
        table.add_row(case, str(equal), ", ".join(meant), ", ".join(wrong))
    console.print(table)
    reasons: dict[str, set[str]] = {}
    for result in results:
        for reason in result.reasons:
            reasons.setdefault(reason, set()).add(result.case)
    for reason, of_cases in reasons.items():
        count = len(of_cases)
        console.print(f"On purpose in {count} {'case' if count == 1 else 'cases'}: {reason}", markup=False)
    _print_differences(console, results)


def _print_differences(console: Console, results: list[PartResult]) -> None:
    """Every unintended difference, line by line; the same one in many cases is printed once."""
    places: dict[tuple[Line, ...], list[PartResult]] = {}
    for result in results:
        if result.wrong:
            places.setdefault(result.lines, []).append(result)
    for lines, where in places.items():
        cases = ", ".join(result.case for result in where)
        console.print(f"\n{where[0].part} differs (- then, + now): {cases}", markup=False, style="bold")
        for line in lines[:LINES_SHOWN]:
            mark = "  (intended)" if line.intended else ""
            console.print(f"  {line.text}{mark}", markup=False, highlight=False)
        if len(lines) > LINES_SHOWN:
            console.print(f"  … {len(lines) - LINES_SHOWN} lines more")


if __name__ == "__main__":
    sys.exit(main())
