"""The guard: a job of seconds that runs when a job of the chain ended badly. It settles what no epilogue saw.

It goes on with the run within its budget (a site that forbids requeueing, a lost batch host), leaves alone what an
epilogue has stopped, and never revives what its owner has cancelled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ftlib import events, state
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import client, policy, queue, settle
from ftlib.slurm.client import Job

# Jobs of one stage that ended before a life could begin, before we stop.
MOST_STILLBORN = 3
# Longer than any submit takes.
CLAIM_S = 300
FAILED = ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def run(folder: str) -> None:
    """What the guard's job runs: `python -m jobs.guard RUN`."""
    print(decide(RunDir(Path(folder))), flush=True)


def decide(run: RunDir) -> str:
    """Go on with the run, or not; returns why."""
    from jobs import chain
    from jobs.wish import stored_profile

    profile = stored_profile(run)
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    jobs = state.submissions(run)
    if words := why_not(run, queue.ask(list(jobs.values())).jobs):
        return words
    wait_for_the_login_node(run.path)
    with run.claim():
        # The jobs behind it are gone with it, or will be in a moment: all are queued anew.
        missing = [name for name in STAGES if not run.stage_done(name)]
        ended = jobs[missing[0]]
        client.cancel(dict.fromkeys(jobs[name] for name in missing[1:] if jobs.get(name, ended) != ended))
        queued = chain.queue(run, profile, {}, by_guard=True)
    return "queued anew: " + ", ".join(f"{name} {job}" for name, job in queued.items())


def why_not(run: RunDir, view: Mapping[str, Job]) -> str | None:
    """Why the run's first stage that is not done must not be queued again; None when it may. `view`: jobs by id."""
    jobs = state.submissions(run)
    stage = next((name for name in STAGES if not run.stage_done(name)), None)
    if stage is None or stage not in jobs:
        return "every stage is done" if stage is None else f"{stage} was never queued"
    log = events.read(run.events)
    if any(e["event"] == "cancelled" and e.get("job_id") == jobs[stage] for e in log):
        return f"{stage} was cancelled by its owner; it stays so"
    # An earlier stage may have run in the same job.
    earlier = [jobs[name] for name in STAGES[: STAGES.index(stage)] if jobs.get(name, jobs[stage]) != jobs[stage]]
    before = earlier[-1] if earlier else jobs.get("image")
    slurm = view.get(jobs[stage], Job("")).state
    # A stage that was done when its batch shell was killed has a FAILED job, and Slurm cancels what waits for it.
    by_dependency = view.get(before or "", Job("COMPLETED")).state in FAILED
    if slurm == "CANCELLED" and not by_dependency:
        events.append(run.events, events.submit_writer(), "cancelled", stage=stage, job_id=jobs[stage])
        return f"{stage} was cancelled by its owner; it stays so"
    if state.SLURM_STATES.get(slurm) in state.ACTIVE:
        return f"{stage} is {slurm}: nothing to do"
    return _stop_reason(run, stage, len(list(run.lives.glob(f"{stage}-*"))), jobs[stage])


def wait_for_the_login_node(folder: Path) -> None:
    """A submit or resume holds its claim for seconds. One that was killed there leaves it, and we cannot see that."""
    file = folder / "writer"
    for _ in range(CLAIM_S):
        try:
            old = time.time() - file.stat().st_mtime > CLAIM_S
        except FileNotFoundError:
            return
        if old:
            file.unlink(missing_ok=True)
            return
        time.sleep(1)


def _stop_reason(run: RunDir, stage: str, lives: int, job: str) -> str | None:
    """Why the stage must not be queued again; None when it may. Settles its last life where nobody has."""
    writer = events.submit_writer()
    ours = [e for e in events.read(run.events) if e.get("stage") == stage]
    since = max((i for i, e in enumerate(ours) if e["event"] == "submitted" and not e.get("automatic")), default=0)
    tried = [e for e in ours[since:] if e["event"] == "submitted" and e.get("after_life") == lives]
    if len(tried) >= MOST_STILLBORN:
        words = f"{len(tried)} jobs in a row ended before they began"
        events.append(run.events, writer, "failed", stage=stage, job_id=job, words=words)
        return words
    if lives == 0 or tried:
        return None
    settle.earlier(run.path, stage, lives + 1, writer)
    last = [e for e in events.read(run.events) if e.get("stage") == stage and e.get("life") == lives and "cause" in e]
    if last and last[-1]["event"] == "failed":
        return f"{stage}: {last[-1].get('words', 'it was stopped')}"
    micro_batch = int(run.plan()["micro_batch"]) if stage == "train" else None
    decision = policy.decide(settle.settled_lives(run.path, stage, lives + 1), micro_batch=micro_batch)
    if decision.requeue:
        return None
    events.append(run.events, writer, "failed", stage=stage, life=lives, job_id=job, words=decision.words)
    return f"{stage}: {decision.words}"


if __name__ == "__main__":
    run(sys.argv[1])
