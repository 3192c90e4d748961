"""The guard: a job of seconds that runs when a job of the chain ended badly. It settles what no epilogue saw.

It goes on with the run within its budget (a site that forbids requeueing, a lost batch host), leaves alone what an
epilogue has stopped, and never revives what its owner has cancelled.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from ftlib import claim, state
from ftlib.errors import FtError, Unavailable
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import events
from ftlib.runs.events import Cancelled, Decided, Submitted
from ftlib.runs.ledger import IMAGE, Ledger
from ftlib.slurm import client, policy, queue, retry, settle
from ftlib.slurm.client import Job

# Jobs of one stage that ended before a life could begin, before we stop.
MOST_STILLBORN = 3
FAILED = ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def run(folder: str) -> None:
    """What the guard's job runs: `python -m jobs.guard RUN`."""
    try:
        print(decide(RunDir(Path(folder))), flush=True)
    except FtError as error:
        print(f"ftlib: {error}. make resume RUN={Path(folder).name} queues what is missing", flush=True)
        sys.exit(error.exit_code)


def decide(run: RunDir) -> str:
    """Go on with the run, or not; returns why."""
    from jobs import chain
    from jobs.wish import stored_profile

    profile = stored_profile(run)
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    jobs = run.ledger().jobs
    view = retry.patiently(lambda: _view(run, jobs), patience_s=retry.RECOVERY_S)
    if words := why_not(run, view):
        return words
    with run.claim(wait_s=claim.SILENT_S, silent_s=claim.SILENT_S):
        # The jobs behind it are gone with it, or will be in a moment: all are queued anew.
        missing = [name for name in STAGES if not run.stage_done(name)]
        ended = jobs[missing[0]]
        behind = list(dict.fromkeys(jobs[name] for name in missing[1:] if jobs.get(name, ended) != ended))
        retry.patiently(lambda: client.cancel(behind), patience_s=retry.RECOVERY_S)
        queued = chain.queue(run, profile, {}, by_guard=True)
    return "queued anew: " + ", ".join(f"{name} {job}" for name, job in queued.items())


def _view(run: RunDir, jobs: Mapping[str, str]) -> dict[str, Job]:
    """What Slurm says of the run's jobs. Unavailable where it does not tell how the stage's job ended."""
    answer = queue.ask(list(jobs.values()))
    stage = next((name for name in STAGES if not run.stage_done(name)), None)
    ended = answer.jobs.get(jobs.get(stage or "", ""), Job("")).state
    # What Slurm cancelled because an earlier job failed, and what its owner cancelled, look the same.
    if ended == queue.UNKNOWN or (ended == "CANCELLED" and answer.unknown(jobs.values())):
        raise Unavailable(f"how {stage} ended cannot be learned: {answer.trouble}")
    return answer.jobs


def why_not(run: RunDir, view: Mapping[str, Job]) -> str | None:
    """Why the run's first stage that is not done must not be queued again; None when it may. `view`: jobs by id."""
    known = run.ledger()
    jobs, stage = known.jobs, known.first_open
    if stage is None or stage not in jobs:
        return "every stage is done" if stage is None else f"{stage} was never queued"
    if any(event.job_id == jobs[stage] for event in known.of(Cancelled)):
        return f"{stage} was cancelled by its owner; it stays so"
    # An earlier stage may have run in the same job.
    earlier = [jobs[name] for name in STAGES[: STAGES.index(stage)] if jobs.get(name, jobs[stage]) != jobs[stage]]
    before = earlier[-1] if earlier else jobs.get(IMAGE)
    slurm = view.get(jobs[stage], Job("")).state
    # A stage that was done when its batch shell was killed has a FAILED job, and Slurm cancels what waits for it.
    by_dependency = view.get(before or "", Job("COMPLETED")).state in FAILED
    if slurm == "CANCELLED" and not by_dependency:
        run.record(Cancelled(stage=stage, job_id=jobs[stage]))
        return f"{stage} was cancelled by its owner; it stays so"
    if state.SLURM_STATES.get(slurm) in state.ACTIVE:
        return f"{stage} is {slurm}: nothing to do"
    return _stop_reason(run, known, stage, jobs[stage])


def _stop_reason(run: RunDir, known: Ledger, stage: str, job: str) -> str | None:
    """Why the stage must not be queued again; None when it may. Settles its last life where nobody has."""
    lives = known.attempt_count(stage)
    since_request = known.events[known.request_index(stage) :]
    submitted = [event for event in since_request if isinstance(event, Submitted) and event.stage == stage]
    tried = [event for event in submitted if event.after_attempt == lives]
    if len(tried) >= MOST_STILLBORN:
        words = f"{len(tried)} jobs in a row ended before they began"
        run.record(Decided(stage=stage, choice="stop", job_id=job, message=words))
        return words
    if lives == 0 or tried:
        return None
    settle.earlier(run.path, stage, lives + 1, events.submit_writer(), by="recovery job")
    known = run.ledger()
    decided = known.last(Decided, stage, lives)
    if decided and decided.choice == "stop":
        return f"{stage}: {decided.message}"
    micro_batch = int(run.plan(known)["micro_batch"]) if stage == "train" else None
    decision = policy.decide(settle.settled_lives(known, stage, lives + 1), micro_batch=micro_batch)
    if decision.requeue:
        return None
    cause = known.settled(stage)[lives].cause
    run.record(
        Decided(stage=stage, choice="stop", job_id=job, attempt=lives, cause=cause, message=decision.words)
    )
    return f"{stage}: {decision.words}"


if __name__ == "__main__":
    run(sys.argv[1])
