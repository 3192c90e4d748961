"""A controller that is busy or restarts is asked again for some minutes, aloud, and no job is queued twice for that."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from ftlib.errors import Unavailable
from ftlib.slurm import client

# How long a person waits for sbatch at most, for one job; and a recovery job or sweep controller, for which nobody
# waits.
SUBMIT_S = 180.0
RECOVERY_S = 600.0
# Seconds between two tries; the last one again and again.
PAUSES_S: tuple[float, ...] = (5, 10, 20, 30)
# sbatch's reasons that pass by themselves, from Slurm's slurm_errno.c and the system's errors. All others (an account,
# a partition, a limit of a QOS) are final.
PASSING = re.compile(
    r"socket timed out|unable to contact slurm controller|zero bytes were transmitted|in standby mode|slurm_load"
    r"|temporarily|controller not responding|connection (?:refused|reset|timed out)|transport endpoint is not connected"
    r"|could not make sense of sbatch output",
    re.IGNORECASE,
)

T = TypeVar("T")


def passes(reason: str) -> bool:
    """Whether sbatch may take the job later. A sbatch that was killed gives no reason."""
    return not reason or PASSING.search(reason) is not None


def submit(
    sbatch: Callable[[], str], what: str, comment: str, *, patience_s: float, before: Collection[str] = ()
) -> str:
    """Queue the job `what` by `sbatch`, which returns its id; returns that id.

    A call whose answer was lost may have queued the job. So it is looked for by its comment before each further call:
    no other job of this user has this `comment`, save those whose ids are in `before`. Refused where Slurm will not
    have the job, or does not answer for `patience_s`.
    """
    deadline, pauses = time.monotonic() + patience_s, _pauses()
    reason = ""
    for number in itertools.count():
        try:
            job = sbatch()
        except Exception as error:  # submitit raises several kinds
            refused = client.Refused(what, error)
            if not passes(refused.reason):
                raise refused from None
            reason = refused.reason or "sbatch ended without an answer"
        else:
            return _keep_first(job, comment, before) if number else job
        _wait(what, reason, pauses)
        try:
            found = patiently(lambda: _jobs_with(comment, before), patience_s=max(0.0, deadline - time.monotonic()))
        except Unavailable as error:
            raise client.Refused(what, error) from None
        if found:
            print(f"ftlib: Slurm has queued {what} after all, as job {found[0]}", file=sys.stderr, flush=True)
            return _keep_first(found[0], comment, before)
        if time.monotonic() > deadline:
            raise client.Refused(what, Exception(f"{reason} (tried for {patience_s / 60:.0f} min)"))
    raise AssertionError("unreachable")


def patiently(ask: Callable[[], T], *, patience_s: float) -> T:
    """`ask()`, again for `patience_s` while it raises Unavailable, saying so each time; then that error."""
    deadline, pauses = time.monotonic() + patience_s, _pauses()
    while True:
        try:
            return ask()
        except client.NoSuchCommand:
            raise
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            _wait("an answer", str(error), pauses)


def _pauses() -> Iterator[float]:
    return itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1]))


def _wait(what: str, reason: str, pauses: Iterator[float]) -> None:
    pause_s = next(pauses)
    print(f"ftlib: {reason}. Trying {what} again in {pause_s:.0f} s", file=sys.stderr, flush=True)
    try:
        time.sleep(pause_s)
    except KeyboardInterrupt:
        print("ftlib: stopped. Run the same command again to continue; nothing is queued twice", file=sys.stderr)
        raise


def _jobs_with(comment: str, before: Collection[str]) -> list[str]:
    """Ids of this user's jobs with that comment, the first one first."""
    found = {job.id.partition("_")[0] for job in client.jobs() if job.comment == comment}
    return sorted(found - set(before), key=int)


def _keep_first(job: str, comment: str, before: Collection[str]) -> str:
    """The first of the jobs that one submission has queued, one of which is `job`. The others, whose call reached the
    controller late, are cancelled."""
    try:
        first, *others = sorted({job, *_jobs_with(comment, before)}, key=int)
        if others:
            print(f"ftlib: job {', '.join(others)} is a second one of job {first}: cancelled", file=sys.stderr)
            client.cancel(others)
        return first
    except Unavailable:
        return job
