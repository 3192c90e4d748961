"""The feeder: a job of seconds that queues what is missing of a sweep, within its limits and the guard's rules.

python -m jobs.feeder runs/sweeps/<sweep>
"""

from __future__ import annotations

import sys
from pathlib import Path

from ftlib.errors import FtError
from ftlib.sweepdir import SweepDir
from jobs import arrays, guard


def main(folder: str) -> int:
    """What the feeder's job runs; prints what it did."""
    sweep = SweepDir(Path(folder))
    guard.wait_for_the_login_node(sweep.path)
    try:
        with sweep.claim():
            print(arrays.feed(sweep, by="feeder").words(), flush=True)
    except FtError as error:
        print(f"ftlib: {error}. make sweep again queues what is missing", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
