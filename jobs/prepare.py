"""The prepare stage: examples become a packed dataset that later runs reuse."""

from __future__ import annotations

from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.sweepdir import share_prepared


def main(run: RunDir, life: int, stop: StopFlag) -> str:
    """Prepare the run's data; returns words for the outcome."""
    from ftlib.data.prepare import prepare

    prepared = prepare(run, stop)
    # After prepared.json was written: who adds a sibling looks for it, so that none is missed.
    share_prepared(run, run.siblings())
    train = prepared["train"]
    found = "found" if prepared["reused"] else "packed"
    return f"{found} {train['examples']:,} examples in {train['rows']:,} rows, {prepared['test']:,} to test with"
