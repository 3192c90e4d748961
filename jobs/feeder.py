"""The feeder: a job of seconds that queues what is missing of a sweep, within its limits and the guard's rules.

    python -m jobs.feeder runs/sweeps/<sweep>
"""

from __future__ import annotations

import sys
from pathlib import Path

from ftlib.sweepdir import SweepDir
from jobs import arrays, guard
from jobs.wish import stored_profile


def main(folder: str) -> None:
    """What the feeder's job runs; prints what it did."""
    sweep = SweepDir(Path(folder))
    guard.wait_for_the_login_node(sweep.path)
    with sweep.claim():
        fed = arrays.feed(sweep, stored_profile(sweep.members()[0]), by="feeder")
    print(fed.words(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
