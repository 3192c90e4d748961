"""The guard: a job of seconds that runs when a job of the chain ended badly. It settles what no epilogue saw.

It goes on with the run within its budget (a site that forbids requeueing, a lost batch host), leaves alone what an
epilogue has stopped, and never revives what its owner has cancelled.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from ftlib import claim, events, state
from ftlib.errors import FtError, Unavailable
from ftlib.rundir import STAGES, RunDir
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
    jobs = state.submissions(run)
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
