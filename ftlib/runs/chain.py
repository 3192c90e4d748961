"""A run's jobs as a chain: queue what is missing, adopt what a killed submit has queued, cancel.

An intent is recorded before a job is submitted, and the job's comment holds the intent's nonce: whoever comes after a
process that was killed in between finds the job by it. Every function here is called under the run's claim.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ftlib.errors import FtError
from ftlib.runs import comments
from ftlib.runs.events import Cancelled, Event, Intended, Submitted
from ftlib.runs.ledger import RECOVERY, STAGES, Ledger
from ftlib.runs.scheduler import Request, Scheduler
from ftlib.runs.store import RunStore


def queue(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], active: Mapping[str, str], *,
    automatic: bool, after: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Queue the run's stages that are neither done nor `active`, and a recovery job for all; stage -> new job.

    jobs: the stages that share each job, in the order of the chain. active: stage -> the job that will run it.
    automatic: no person has asked for it now. after: a job that must complete before the first one.
    Where a job is refused, those queued before it stay and wait for the rest; FtError says so.
    """
    ledger = run.ledger()
    queued: dict[str, str] = {}
    before = after
    try:
        for stages in jobs:
            missing = [stage for stage in stages if not ledger.done(stage)]
            before = next((active[stage] for stage in reversed(missing) if stage in active), before)
            if new := tuple(stage for stage in missing if stage not in active):
                request = Request(new, new_nonce(), after_ok=before)
                before = queue_job(run, scheduler, ledger, request, automatic=automatic)
                queued |= dict.fromkeys(new, before)
        if queued or not ledger.has_recovery_job:
            watched = [*(job for stage, job in active.items() if stage in STAGES), *queued.values()]
            request = Request((RECOVERY,), new_nonce(), after_not_ok=tuple(dict.fromkeys(watched)))
            queue_job(run, scheduler, ledger, request, automatic=automatic)
    except FtError as error:
        raise FtError(
            f"{error}. Queued before it: {', '.join(queued) or 'nothing'}; make resume RUN={run.name} queues what is "
            "missing"
        ) from None
    return queued


def adopt(run: RunStore, scheduler: Scheduler) -> list[str]:
    """Record the jobs that a process queued which was killed before it could record their ids; returns their stages."""
    ledger = run.ledger()
    answered = {event.nonce for event in ledger.of(Submitted)}
    open_intents = {event.nonce for event in ledger.of(Intended)} - answered
    adopted: list[str] = []
    for job in scheduler.queue() if open_intents else ():
        comment = comments.parse(job.comment)
        if comment and comment.run == run.name and comment.nonce in open_intents:
            submitted = Submitted(stage=comment.stages[0], job_id=job.id, nonce=comment.nonce)
            _record_submission(run, ledger, comment.stages, submitted)
            adopted += comment.stages
    return adopted


def cancel(run: RunStore, scheduler: Scheduler, jobs: Mapping[str, str], user: str | None) -> None:
    """Cancel the stages' jobs (stage -> job id), the last first, so that none starts because another ended."""
    last_first = list(jobs)[::-1]
    run.record(*(Cancelled(stage=stage, job_id=jobs[stage], user=user) for stage in last_first))
    # A job of two stages once.
    scheduler.cancel(dict.fromkeys(jobs[stage] for stage in last_first))


def queue_job(run: RunStore, scheduler: Scheduler, ledger: Ledger, request: Request, *, automatic: bool) -> str:
    """Queue one job, its intent and its submission recorded; returns its id."""
    run.record(*(Intended(stage=stage, nonce=request.nonce) for stage in request.stages))
    submitted = scheduler.submit(request)
    _record_submission(run, ledger, request.stages, replace(submitted, automatic=automatic))
    return submitted.job_id


def _record_submission(run: RunStore, ledger: Ledger, stages: Sequence[str], submitted: Submitted) -> None:
    rows: list[Event] = [
        replace(submitted, stage=stage, after_attempt=ledger.attempt_count(stage)) for stage in stages
    ]  # fmt: skip
    run.record(*rows)


def new_nonce() -> str:
    """A word that no other job's comment holds."""
    return uuid.uuid4().hex[:12]
