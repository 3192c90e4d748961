"""python -m benchmarks.simulate: many random histories, or one of them."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter

from benchmarks.simulate import driver


def main(words: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--histories", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="tell it operation by operation")
    parser.add_argument("--shrink", action="store_true", help="with as few injections as still fail")
    options = parser.parse_args(words)
    if options.seed is not None:
        result = driver.run(driver.history_of(options.seed), tracing=options.trace)
        if options.shrink and result.violations:
            result = driver.shrink(result)
        print(result.history.scenario)
        for injection in result.history.injections:
            print("  ", injection)
        print("\n".join(result.trace))
        print(result.end, *result.violations, sep="\n  ")
        return 1 if result.violations else 0
    began = time.monotonic()
    ends: Counter[str] = Counter()
    invariants: Counter[str] = Counter()
    examples: dict[str, int] = {}
    for seed in range(options.first, options.first + options.histories):
        result = driver.run(driver.history_of(seed))
        ends[result.end] += 1
        for violation in result.violations:
            name = re.sub(r'\d+(_\d)?', 'N', str(violation))[:110]
            invariants[name] += 1
            examples.setdefault(name, seed)
    took = time.monotonic() - began
    print(f"{options.histories / took:.0f} histories/s; {dict(ends)}")
    for name, count in invariants.most_common(40):
        print(f"  {count:5}  {name}   seed {examples[name]}")
    return 1 if invariants else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
