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

    jobs: the stages that share each job, in the order of the chain. active: stage -> the job that will run it, and
    "recovery" -> the recovery job where one waits for all of them.
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
        if queued or RECOVERY not in active:
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
    """Record the jobs that a process queued which was killed before it could record their ids; returns their stages.

    One whose stage was queued again since then came too late: it is cancelled.
    """
    ledger = run.ledger()
    submitted_by = {event.nonce: event for event in ledger.of(Submitted)}
    answered = {(event.nonce, event.stage) for event in ledger.of(Submitted)}
    open_intents = [event for event in ledger.of(Intended) if (event.nonce, event.stage) not in answered]
    unheard = {event.nonce for event in open_intents} - submitted_by.keys()
    for job in scheduler.queue() if unheard else ():
        comment = comments.parse(job.comment)
        if comment is None or comment.run != run.name or comment.nonce not in unheard:
            continue
        if any(_came_too_late(ledger, intent, job.id) for intent in open_intents if intent.nonce == comment.nonce):
            scheduler.cancel([job.id])
        else:
            submitted_by[comment.nonce] = Submitted(stage=comment.stages[0], job_id=job.id, nonce=comment.nonce)
    # A process may also be killed between the stages that share a job.
    adopted = [
        replace(
            submitted_by[intent.nonce], stage=intent.stage, writer="",
            # The request behind it is recorded by itself: this is none.
            automatic=True,
            after_attempt=_attempts_before(ledger, intent.stage, submitted_by[intent.nonce].job_id),
        )
        for intent in open_intents
        if intent.nonce in submitted_by and not _came_too_late(ledger, intent, submitted_by[intent.nonce].job_id)
    ]  # fmt: skip
    if adopted:
        run.record(*adopted)
    return [event.stage for event in adopted]


def cancel(
    run: RunStore, scheduler: Scheduler, jobs: Mapping[str, str], user: str | None, *, active: Sequence[str]
) -> None:
    """Cancel the stages' jobs (stage -> job id, empty where it has none), of which `active` have not ended, the last
    first, so that none starts because another ended. It is recorded first: should this process be killed in between, no
    job starts again."""
    last_first = list(jobs)[::-1]
    stages = [stage for stage in last_first if stage in STAGES]
    run.record(*(Cancelled(stage=stage, job_id=jobs[stage], user=user) for stage in stages))
    # A job of two stages once.
    scheduler.cancel(dict.fromkeys(jobs[stage] for stage in last_first if jobs[stage] in active))


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


def _came_too_late(ledger: Ledger, intent: Intended, job_id: str) -> bool:
    """Whether the stage was queued again after the intent, and its newest attempt is not that job's."""
    since = ledger.events.index(intent)
    again = any(isinstance(event, Submitted) and event.stage == intent.stage for event in ledger.events[since:])
    attempts = ledger.attempts.get(intent.stage, ())
    return again and (not attempts or attempts[-1].job_id != job_id)


def _attempts_before(ledger: Ledger, stage: str, job_id: str) -> int:
    """How many attempts the stage had before the first one of that job."""
    attempts = ledger.attempts.get(stage, ())
    return next((index for index, attempt in enumerate(attempts) if attempt.job_id == job_id), len(attempts))


def new_nonce() -> str:
    """A word that no other job's comment holds."""
    return uuid.uuid4().hex[:12]
