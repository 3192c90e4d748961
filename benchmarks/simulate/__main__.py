"""python -m benchmarks.simulate: many random histories, or one of them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks.simulate import driver, many, planted


def search(bug: str, *, first: int, most: int, workers: int) -> int:
    """Print after how many histories each bug is found; 1 where one is not."""
    missed = 0
    names = list(planted.BUGS) if bug == "all" else [bug]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for name, found in zip(names, pool.imap(partial(planted.search, first=first, most=most), names), strict=True):
            print(f"{name}: {f'history {found[0]:,}: {found[1]}' if found else 'not found'}", flush=True)
            missed += not found
    return 1 if missed else 0


def main(words: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--histories", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one for each core")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first history (default: 0)")
    parser.add_argument(
        "--state", type=Path, default=many.CHECKOUT / "build" / "simulate.json", help="where it keeps how far it came"
    )
    parser.add_argument("--seed", type=int, help="this history alone, operation by operation")
    parser.add_argument("--shrink", action="store_true", help="with --seed: as few injections as still fail")
    parser.add_argument(
        "--planted", metavar="BUG", help="after how many of the histories this bug is found; 'all': each of them"
    )
    options = parser.parse_args(words)
    if options.planted:
        return search(options.planted, first=options.first, most=options.histories, workers=options.workers)
    if options.seed is None:
        return many.run(
            histories=options.histories, first=options.first, workers=options.workers, state_file=options.state
        )
    result = driver.run(driver.history_of(options.seed), tracing=True)
    if options.shrink and result.violations:
        result = driver.shrink(result)
    print(many.describe(result))
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
