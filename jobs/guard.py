"""The recovery job: a job of seconds that runs when a job of the chain ended badly, and settles what no epilogue saw.

It continues the run within its budgets (a site that forbids requeueing, a lost batch host), leaves alone what an
epilogue has stopped, and never revives what its owner has cancelled: python -m jobs.guard RUN
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from ftlib.errors import FtError, InputError
from ftlib.rundir import RunDir
from ftlib.runs import act
from ftlib.runs.decide import Action, QueueAnew
from ftlib.slurm.investigate import investigator

# A file system that does not answer is waited for: nobody else would continue the run.
TRY_FOR_S, PAUSE_S = 600.0, 15.0


def main(folder: str) -> int:
    """Continue the run, or say why not."""
    run = RunDir(Path(folder))
    try:
        if gone := run.gone():
            raise InputError(gone)
        action = patiently(lambda: recover(run))
    except FtError as error:
        print(f"ftlib: {error}. make resume RUN={run.name} continues the run", flush=True)
        return error.exit_code
    queued = ", ".join(f"{stage} {job}" for stage, job in run.ledger().jobs.items() if stage in _stages(action))
    print(f"queued anew: {queued} ({action.message})" if queued else action.message, flush=True)
    return 0


def recover(run: RunDir) -> Action:
    """Do what is due about the run."""
    from jobs import chain

    site = chain.site_of(run, patient=True)
    investigate = investigator(run.path)
    return act.recover(run, site, site.jobs, investigate, image_job=site.queue_image)


def patiently(call: Callable[[], Action]) -> Action:
    """What `call` returns; it is tried again for some minutes where the file system does not answer."""
    deadline = time.monotonic() + TRY_FOR_S
    while True:
        try:
            return call()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            print(f"ftlib: {error}; trying again in {PAUSE_S:.0f} s", flush=True)
            time.sleep(PAUSE_S)


def _stages(action: Action) -> tuple[str, ...]:
    return action.stages if isinstance(action, QueueAnew) else ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
