"""Old and planted bugs, one at a time: a simulation that does not find them proves nothing.

Each is a small patch of the real code, as somebody might write it. `python -m benchmarks.simulate --planted all` says
after how many histories each is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from benchmarks.simulate import driver
from benchmarks.simulate.commands import SimulatedScheduler
from benchmarks.simulate.files import Store
from ftlib.errors import Unavailable
from ftlib.runs import act, chain, comments, decide, scheduler
from ftlib.runs.decide import Action, Nothing, Stop
from ftlib.runs.events import Intended, Submitted
from ftlib.runs.ledger import Ledger
from ftlib.runs.scheduler import Here, Job, Request, SchedulerView
from ftlib.slurm import evidence


def _plain_requeue(controller: Any, job_id: str, changes: dict[str, str], **_: Any) -> str:
    controller.requeue(job_id, incomplete_only=False)
    if changes:
        controller.update(job_id, changes)
    return act.REQUEUED


def _inside_without_cancellation(inside: Callable[..., Action]) -> Callable[..., Action]:
    def forgetful(ledger: Ledger, view: SchedulerView, here: Here, now: float) -> Action:
        action = inside(ledger, view, here, now)
        if isinstance(action, Stop) and action.cause == "cancelled" and not here.ended:
            return Nothing(message="begins", stage=here.stage)
        return action

    return forgetful


def _queue_without_intent(run: Any, site: Any, ledger: Ledger, request: Request, *, automatic: bool) -> str:
    submitted = site.submit(request)
    run.record(
        *(
            dataclasses.replace(
                submitted, stage=stage, automatic=automatic, after_attempt=ledger.attempt_count(stage)
            )
            for stage in request.stages
        )
    )
    return str(submitted.job_id)


def _adopt_by_name(run: Any, site: Any) -> list[str]:
    """The newest job of the run that has no submission, whatever its nonce."""
    ledger = run.ledger()
    answered = {(event.nonce, event.stage) for event in ledger.of(Submitted)}
    waiting = {event.stage for event in ledger.of(Intended) if (event.nonce, event.stage) not in answered}
    adopted = {}
    for job in site.queue() if waiting else ():
        comment = comments.parse(job.comment)
        if comment is None or comment.run != run.name:
            continue
        for stage in comment.stages:
            if stage in waiting:
                count = ledger.attempt_count(stage)
                adopted[stage] = Submitted(
                    stage=stage, job_id=job.id, nonce=comment.nonce, automatic=True, after_attempt=count
                )
    if adopted:
        run.record(*adopted.values())
    return list(adopted)


@contextlib.contextmanager
def _no_claim(self: Store, *, wait_s: float = 0.0, silent_s: float | None = None) -> Iterator[None]:
    yield


def _partial_without_after(kind: type, **fields: Any) -> Any:
    return functools.partial(kind, **{name: value for name, value in fields.items() if name != "after"})


def _all_attempts(self: Ledger, stage: str, *, up_to: int) -> dict[int, Any]:
    return {number: end for number, end in sorted(self.settled(stage).items()) if number <= up_to}


def _since_submission(self: Ledger, stage: str, *, up_to: int) -> dict[int, Any]:
    """Of the newest job alone, whoever queued it."""
    first = max((event.after_attempt + 1 for event in self.of(Submitted, stage)), default=1)
    return {number: end for number, end in sorted(self.settled(stage).items()) if first <= number <= up_to}


def _silence_is_an_end(look: Callable[..., SchedulerView]) -> Callable[..., SchedulerView]:
    def credulous(self: SimulatedScheduler, job_ids: Sequence[str]) -> SchedulerView:
        try:
            return look(self, job_ids)
        except Unavailable:
            return SchedulerView(jobs={job_id: Job("") for job_id in job_ids})

    return credulous


def _adopted_is_requested(original: Any, **fields: Any) -> Any:
    adopted = "writer" in fields and "after_attempt" in fields
    return dataclasses.replace(original, **({**fields, "automatic": False} if adopted else fields))


def _requeue_whoever_runs(requeue: Callable[..., str]) -> Callable[..., str]:
    def blind(controller: Any, job_id: str, changes: dict[str, str], **options: Any) -> str:
        return requeue(controller, job_id, changes, **{**options, "restarts": None})

    return blind


def _begin_unasked(begin: Callable[..., Action]) -> Callable[..., Action]:
    def first_is_free(run: Any, controller: Any, here: Here, investigate: Any, **options: Any) -> Action:
        if here.attempt == 1:
            return Nothing(message="begins", stage=here.stage)
        return begin(run, controller, here, investigate, **options)

    return first_is_free


# Name -> what is patched: an object, the name of its attribute, and what replaces it.
BUGS: dict[str, tuple[Any, str, Any]] = {
    "a plain requeue instead of Incomplete and a probe": (act, "requeue", _plain_requeue),
    "a superseded job is not noticed": (Ledger, "superseded", lambda self, stage, job_id: False),
    "the prologue forgets a cancellation": (decide, "_inside", _inside_without_cancellation(decide._inside)),
    "a job is queued without an intent": (chain, "queue_job", _queue_without_intent),
    "jobs are adopted by the run's name": (chain, "adopt", _adopt_by_name),
    "nobody claims the run": (Store, "claim", _no_claim),
    "an override does not say of which end it is": (decide, "partial", _partial_without_after),
    "budgets ignore the owner's requests": (Ledger, "attempts_since_request", _all_attempts),
    "budgets begin anew with every job": (Ledger, "attempts_since_request", _since_submission),
    "PREEMPTED counts as active": (scheduler, "AT_WORK", (*scheduler.AT_WORK, "PREEMPTED")),
    "a cancellation by Slurm is taken for the owner's": (decide, "_by_dependency", lambda *arguments: False),
    "a scheduler that is silent has ended all jobs": (
        SimulatedScheduler, "look", _silence_is_an_end(SimulatedScheduler.look),
    ),
    "an adopted job is taken for a request of the owner's": (chain, "replace", _adopted_is_requested),
    "an epilogue requeues whatever runs under its job's id": (act, "requeue", _requeue_whoever_runs(act.requeue)),
    "the first attempt begins unasked": (act, "begin_attempt", _begin_unasked(act.begin_attempt)),
    "a log is read beyond the end of the attempt's start": (evidence, "until_restart", lambda text: text),
}  # fmt: skip


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug of that name, while this lasts."""
    owner, attribute, replacement = BUGS[name]
    with mock.patch.object(owner, attribute, replacement):
        yield


def search(name: str, *, first: int = 0, most: int) -> tuple[int, str] | None:
    """How many histories it takes until the bug violates an invariant, and which; None where `most` are not enough."""
    with planted(name):
        for count in range(1, most + 1):
            result = driver.run(driver.history_of(first + count - 1))
            if result.violations:
                return count, str(result.violations[0])
    return None
