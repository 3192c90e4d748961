"""The one decision: what is done next about a run. Pure: a ledger, what Slurm says, and the time decide alone.

    prologue, epilogue ─┐
    recovery job        │
    submit, resume      ├─► next_action(ledger, view, now) ─► Requeue │ Leave │ Stop │ QueueAnew │ Nothing
    sweep controller    │
    status, why        ─┘

Whoever asks has recorded before why the attempts of `open_ends` ended; whoever acts records the action's events first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from ftlib.runs import overrides, policy
from ftlib.runs.diagnosis import Cause
from ftlib.runs.events import Cancelled, Choice, Decided, Event, Override, Settled, Submitted
from ftlib.runs.ledger import IMAGE, STAGES, Ledger, open_stages
from ftlib.runs.scheduler import AT_WORK, CANCELLED, FAILED, Here, SchedulerView

# Jobs of one stage in a row that ended before an attempt could begin, before the run is stopped.
MOST_STILLBORN = 3
EXCLUSION_S = 24 * 3600.0
# Ends that look like a cancellation where nothing says who ended the job.
MAY_BE_CANCELLED = ("preemption", "time limit", "killed", "unknown")
EXIT_INTERRUPTED, EXIT_CANCELLED = 75, 143


@dataclass(frozen=True, kw_only=True)
class Action:
    """What all decisions have in common."""

    message: str  # for people, a sentence without its full stop
    cause: str = ""  # of the end that led to it (diagnosis.Cause); empty without one
    stage: str = ""
    attempt: int = 0  # the attempt that ended; 0 where none had begun
    job_id: str = ""
    changes: tuple[Override, ...] = ()  # to be recorded with the decision

    def events(self) -> tuple[Event, ...]:
        """What has to be recorded before it is acted upon."""
        return ()

    def _decided(self, choice: Choice, code: int = 0) -> tuple[Event, ...]:
        decided = Decided(
            stage=self.stage, choice=choice, job_id=self.job_id, attempt=self.attempt, cause=self.cause,
            message=self.message, code=code,
        )  # fmt: skip
        return (*self.changes, decided)


@dataclass(frozen=True, kw_only=True)
class Requeue(Action):
    """Put the job that asks back into the queue."""

    backoff_s: int = 0  # before it may start

    def events(self) -> tuple[Event, ...]:
        return self._decided("requeue")


@dataclass(frozen=True, kw_only=True)
class Leave(Action):
    """It would be requeued, but the site forbids that: the job ends, and the recovery job queues the rest anew."""

    def events(self) -> tuple[Event, ...]:
        return self._decided("leave")


@dataclass(frozen=True, kw_only=True)
class Stop(Action):
    """The run is over until its owner asks for more."""

    code: int = 1  # exit code of the job

    def events(self) -> tuple[Event, ...]:
        if self.cause == "cancelled":
            return (Cancelled(stage=self.stage, job_id=self.job_id), *self._decided("stop", self.code))
        return self._decided("stop", self.code)


@dataclass(frozen=True, kw_only=True)
class QueueAnew(Action):
    """Queue `stages` in new jobs."""

    stages: tuple[str, ...] = ()
    obsolete_jobs: tuple[str, ...] = ()  # that wait for what has failed: to be cancelled first

    def events(self) -> tuple[Event, ...]:
        # The first submission of a run follows no end, and nothing but the submission is recorded of it.
        return self._decided("queue anew") if self.job_id else ()


@dataclass(frozen=True, kw_only=True)
class Nothing(Action):
    """There is nothing to do: all is done, under way, or stopped for good."""

    superseded: bool = False  # a later attempt has taken over: whoever asks must leave
    over: bool = False  # the run was stopped or cancelled, and only its owner can make it continue
    under_way: bool = False  # the stage's job waits or runs


def open_ends(ledger: Ledger, view: SchedulerView) -> list[tuple[str, int]]:
    """(stage, attempt) of all attempts that have ended without success and of which no cause is recorded yet."""
    found = []
    # A trial's stage (smoke) is none of the chain's.
    own = () if view.here is None or view.here.stage in STAGES else (view.here.stage,)
    for stage in (*STAGES, *own):
        settled = ledger.settled(stage)
        last = ledger.attempt_count(stage)
        for attempt in ledger.attempts.get(stage, ()):
            outcome = ledger.outcome(stage, attempt.number)
            ended = attempt.number < last or _has_ended(ledger, view, stage, attempt.number)
            if ended and attempt.number not in settled and not (outcome and outcome.code == 0):
                found.append((stage, attempt.number))
    return found


def with_unknown_ends(ledger: Ledger, view: SchedulerView) -> Ledger:
    """The ledger for one who only looks: ends of which no cause is recorded yet have an unknown one."""
    ends = [
        Settled(stage=stage, attempt=attempt, job_id=ledger.jobs.get(stage, ""), cause="unknown", by="owner")
        for stage, attempt in open_ends(ledger, view)
    ]  # fmt: skip
    return ledger.with_events(*ends) if ends else ledger


def _has_ended(ledger: Ledger, view: SchedulerView, stage: str, attempt: int) -> bool:
    """Whether the newest attempt of a stage is over."""
    here = view.here
    if here and here.stage == stage:
        return here.ended if here.attempt == attempt else attempt < here.attempt
    if here:
        return False
    job = ledger.jobs.get(stage)
    return job is not None and view.knows(job) and not view.active(job)


def next_action(ledger: Ledger, view: SchedulerView, now: float) -> Action:
    """What is to be done about the run now (`now` in seconds since 1970)."""
    if view.here is not None:
        return _inside(ledger, view, view.here, now)
    stage = ledger.first_open
    if stage is None:
        return Nothing(message="every stage is done")
    job = ledger.jobs.get(stage)
    if job is None:
        return _never_queued(ledger, view, stage)
    if not view.knows(job):
        return Nothing(message=f"Slurm does not answer, so nothing is known of {stage}", stage=stage, job_id=job)
    if view.active(job):
        return _under_way(ledger, view, stage, job)
    return _after_job(ledger, view, stage, job, now)


# -- on a login node, and in the recovery job --------------------------------------------------------------------------


def _never_queued(ledger: Ledger, view: SchedulerView, stage: str) -> Action:
    if ledger.cancelled(stage, "") or ledger.cancelled_since_request:
        return Nothing(message=f"{stage} was cancelled by its owner", cause="cancelled", stage=stage, over=True)
    return QueueAnew(message=f"{stage} is not queued yet", stage=stage, stages=_missing(ledger, view, stage))


def _under_way(ledger: Ledger, view: SchedulerView, stage: str, job: str) -> Action:
    if ledger.cancelled(stage, job):
        return Nothing(
            message=f"{stage} was cancelled and is still saving", cause="cancelled", stage=stage, job_id=job
        )  # fmt: skip
    if missing := _missing(ledger, view, stage):
        # A submission that was killed, or refused, in the middle of the chain.
        return QueueAnew(
            message=f"{missing[0]} is not queued yet", stage=missing[0], stages=missing,
            obsolete_jobs=_active_jobs(ledger, view, missing, but=job),
        )  # fmt: skip
    return Nothing(message=f"{stage} is {view.job(job).state.lower()}", stage=stage, job_id=job, under_way=True)


def _after_job(ledger: Ledger, view: SchedulerView, stage: str, job: str, now: float) -> Action:
    """The stage's job is over and the stage is not done."""
    if at_work := _later_at_work(ledger, view, stage, job):
        # Its job was cancelled, or it is another's: two attempts of one stage must never be at work.
        return Nothing(
            message=f"{at_work} was cancelled and is still saving", cause="cancelled", stage=at_work,
            job_id=ledger.jobs[at_work],
        )  # fmt: skip
    if ledger.resume_pending(stage):
        return QueueAnew(
            message="its owner wants it to continue", stage=stage, stages=tuple(open_stages(ledger)),
            obsolete_jobs=_behind(ledger, view, stage, job),
        )  # fmt: skip
    if ledger.cancelled(stage, job) or ledger.cancelled_since_request:
        return Nothing(
            message=f"{stage} was cancelled by its owner", cause="cancelled", stage=stage, job_id=job, over=True
        )  # fmt: skip
    if not _chained(ledger, stage):
        # A submission ended in the middle of the chain, and what this job had waited for was queued again.
        return QueueAnew(
            message=f"{stage} is not queued yet", stage=stage, stages=tuple(open_stages(ledger)),
            obsolete_jobs=_behind(ledger, view, stage, job),
        )  # fmt: skip
    stops = [decided for decided in ledger.decisions(stage) if decided.choice == "stop"]
    if stops:
        last = stops[-1]
        return Nothing(
            message=f"{stage} was stopped: {last.message}", cause=last.cause, stage=stage, job_id=job,
            attempt=last.attempt, over=True,
        )  # fmt: skip
    if view.job(job).state in CANCELLED and not _by_dependency(ledger, view, stage, job):
        return Stop(
            message=f"{stage} was cancelled by its owner", cause="cancelled", stage=stage, job_id=job,
            code=EXIT_CANCELLED, attempt=_attempt_of(ledger, stage, job),
        )  # fmt: skip
    attempt = _attempt_of(ledger, stage, job)
    if attempt == 0:
        return _stillborn(ledger, view, stage, job)
    last_choice = next((one for one in reversed(ledger.decisions(stage)) if one.attempt == attempt), None)
    cause = _cause(ledger, stage, attempt)
    if not view.job(job).state and _may_be_cancelled(last_choice, cause):
        return Stop(
            message=f"Slurm no longer knows how the job of {stage} ended, so it may have been cancelled",
            cause=cause, stage=stage, job_id=job, attempt=attempt,
        )  # fmt: skip
    decision = _decision(ledger, stage, attempt, now)
    if not decision.requeue:
        return Stop(message=decision.message, cause=cause, stage=stage, job_id=job, attempt=attempt)
    return QueueAnew(
        message=decision.message, cause=cause, stage=stage, job_id=job, attempt=attempt,
        changes=decision.changes,
        stages=tuple(open_stages(ledger)), obsolete_jobs=_behind(ledger, view, stage, job),
    )  # fmt: skip


def _may_be_cancelled(last_choice: Decided | None, cause: str) -> bool:
    """Whether a job may have been cancelled of which Slurm knows nothing any more."""
    if last_choice is None:
        return cause in MAY_BE_CANCELLED
    # A job that was requeued can be cancelled at any time; one that was left has ended right after that.
    return last_choice.choice == "requeue"


def _stillborn(ledger: Ledger, view: SchedulerView, stage: str, job: str) -> Action:
    """The job ended before an attempt could begin: its node failed, or the stage before it."""
    if not view.job(job).state:
        return Stop(
            message=f"Slurm does not know the job of {stage} any more, and nothing shows that it ever began",
            cause="unknown", stage=stage, job_id=job,
        )  # fmt: skip
    count = ledger.attempt_count(stage)
    since = ledger.request_index(stage)
    tried = [
        event for event in ledger.events[since:]
        if isinstance(event, Submitted) and event.stage == stage and event.after_attempt == count
    ]  # fmt: skip
    if len(tried) >= MOST_STILLBORN:
        return Stop(
            message=f"{len(tried)} jobs in a row ended before they began", cause="unknown", stage=stage, job_id=job
        )  # fmt: skip
    return QueueAnew(
        message=f"the job of {stage} ended before it began", cause="unknown", stage=stage, job_id=job,
        stages=tuple(open_stages(ledger)), obsolete_jobs=_behind(ledger, view, stage, job),
    )  # fmt: skip


# -- inside a job ------------------------------------------------------------------------------------------------------


def _inside(ledger: Ledger, view: SchedulerView, here: Here, now: float) -> Action:
    stage, job = here.stage, here.job_id
    if ledger.attempt_count(stage) > here.attempt:
        return _nothing(here, "a later attempt has taken over", superseded=True)
    if ledger.superseded(stage, job):
        return _nothing(here, "a later job has taken over", superseded=True)
    if ledger.done(stage):
        return _nothing(here, f"{stage} is done")
    if ledger.cancelled(stage, job) or ledger.cancelled_since_request or view.job(job).state in CANCELLED:
        return Stop(
            message=f"{stage} was cancelled by its owner", cause="cancelled", code=EXIT_CANCELLED, stage=stage,
            job_id=job, attempt=here.attempt,
        )  # fmt: skip
    last = here.attempt if here.ended else here.attempt - 1
    if last not in ledger.attempts_since_request(stage, up_to=last):
        return _nothing(here, f"attempt {here.attempt} of {stage} begins")
    decision, cause = _decision(ledger, stage, last, now, here), _cause(ledger, stage, last)
    if not decision.requeue:
        outcome, settled = ledger.outcome(stage, last), ledger.settled(stage)[last]
        code = outcome.code if outcome and outcome.code not in (0, EXIT_INTERRUPTED) else settled.code or 1
        return Stop(message=decision.message, cause=cause, code=code, stage=stage, job_id=job, attempt=last)
    if not here.ended:
        return _nothing(here, f"attempt {here.attempt} of {stage} begins")
    if not here.may_requeue:
        return Leave(
            message=decision.message, cause=cause, stage=stage, job_id=job, attempt=last, changes=decision.changes
        )  # fmt: skip
    return Requeue(
        message=decision.message, cause=cause, stage=stage, job_id=job, attempt=last, changes=decision.changes,
        backoff_s=decision.backoff_s,
    )  # fmt: skip


def _nothing(here: Here, message: str, *, superseded: bool = False) -> Nothing:
    return Nothing(
        message=message, superseded=superseded, stage=here.stage, job_id=here.job_id, attempt=here.attempt
    )  # fmt: skip


# -- what the policy says, with the run's own figures ------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    requeue: bool
    message: str
    backoff_s: int = 0
    changes: tuple[Override, ...] = ()


def _decision(ledger: Ledger, stage: str, attempt: int, now: float, here: Here | None = None) -> _Decision:
    """What the policy says after an attempt, given all that ended since the owner last asked for the stage."""
    settled_ends = ledger.attempts_since_request(stage, up_to=attempt)
    causes = {number: cast(Cause, settled.cause) for number, settled in settled_ends.items()}
    # Who only looks at the run settles nothing.
    causes.setdefault(attempt, "unknown")
    ends = [policy.Life(cause, ledger.progressed(stage, number)) for number, cause in sorted(causes.items())]
    current = overrides.fold(ledger.events, now)
    micro_batch = (current.micro_batch or ledger.micro_batch) if stage == "train" else None
    said = policy.decide(ends, micro_batch=micro_batch)
    if not said.requeue:
        return _Decision(requeue=False, message=said.words)
    after = f"{stage}-{attempt}"
    if any(override.after == after for override in ledger.of(Override)):
        # Whoever decided this before has recorded what it changes.
        return _Decision(requeue=True, message=said.words, backoff_s=said.backoff_s)
    settled = ledger.settled(stage).get(attempt)
    if settled is None:
        return _Decision(requeue=True, message=said.words, backoff_s=said.backoff_s)
    change = partial(Override, who="ftlib", why=settled.line, after=after)
    changes = []
    if said.halve_micro_batch and micro_batch:
        changes.append(change(field=overrides.MICRO_BATCH, value=ledger.smaller_micro_batch(micro_batch)))
    if said.exclude_node and settled.node:
        changes.append(change(field=overrides.EXCLUDE + settled.node, value=True, until=now + EXCLUSION_S))
    if said.memory_factor != 1:
        memory = _more_memory(ledger, current, stage, said.memory_factor, here)
        if memory is None:
            return _Decision(requeue=False, message=f"{policy.KINDS['host memory'].plain}, and a node has no more")
        if memory:
            changes.append(change(field=overrides.MEMORY + stage, value=memory))
    return _Decision(requeue=True, message=said.words, backoff_s=said.backoff_s, changes=tuple(changes))


def _more_memory(
    ledger: Ledger, current: overrides.Overrides, stage: str, factor: float, here: Here | None
) -> int | None:
    """MiB to request on each node; 0 where it is not known what was requested, None where a node has no more."""
    submitted = ledger.submissions.get(stage)
    requested = current.memory_mib.get(stage) or (submitted.mem_mib if submitted else None)
    requested = requested or (here.mem_mib if here else None)
    if not requested:
        return 0
    most = submitted.node_mem_mib if submitted and submitted.node_mem_mib else int(requested * factor)
    grown = min(int(requested * factor), most)
    return grown if grown > requested else None


# -- jobs --------------------------------------------------------------------------------------------------------------


def _missing(ledger: Ledger, view: SchedulerView, first: str) -> tuple[str, ...]:
    """Stages from `first` on that are not done, and have no job that waits for the one before."""
    stages = open_stages(ledger, STAGES[STAGES.index(first) :])
    for index, stage in enumerate(stages):
        if not _chained(ledger, stage):
            # What waits for it would wait for nothing.
            return tuple(name for name in stages[index:] if not ledger.cancelled(name, ""))
    return ()


def _chained(ledger: Ledger, stage: str) -> bool:
    """Whether the stage's job was queued after the job of the stage before it, or shares it."""
    if stage not in ledger.jobs:
        return False
    before = [name for name in STAGES[: STAGES.index(stage)] if name in ledger.jobs]
    if not before or ledger.jobs[before[-1]] == ledger.jobs[stage]:
        return True
    return ledger.queue_order[before[-1]] < ledger.queue_order[stage]


def _behind(ledger: Ledger, view: SchedulerView, stage: str, ended: str) -> tuple[str, ...]:
    """Jobs of later stages, which wait for the one that has ended."""
    later = [name for name in STAGES[STAGES.index(stage) + 1 :] if not ledger.done(name)]
    return _active_jobs(ledger, view, later, but=ended)


def _active_jobs(ledger: Ledger, view: SchedulerView, stages: Sequence[str], *, but: str) -> tuple[str, ...]:
    """The jobs of `stages` that are queued or running, each once."""
    jobs = (ledger.jobs.get(name) for name in stages)
    return tuple(dict.fromkeys(job for job in jobs if job and job != but and view.active(job)))


def _later_at_work(ledger: Ledger, view: SchedulerView, stage: str, job: str) -> str | None:
    """The first later stage whose job runs, though the stage before it is not done: it is about to end."""
    for later in open_stages(ledger, STAGES[STAGES.index(stage) + 1 :]):
        if (its_job := ledger.jobs.get(later)) and its_job != job and view.job(its_job).state in AT_WORK:
            return later
    return None


def _by_dependency(ledger: Ledger, view: SchedulerView, stage: str, job: str) -> bool:
    """Whether Slurm itself has cancelled the job because the one before it failed: a stage that was done when its batch
    shell was killed has a FAILED job."""
    earlier = [name for name in STAGES[: STAGES.index(stage)] if ledger.jobs.get(name, "") not in ("", job)]
    if earlier and _done_elsewhere(ledger, earlier[-1]):
        return True
    previous = ledger.jobs[earlier[-1]] if earlier else ledger.jobs.get(IMAGE)
    return previous is not None and view.job(previous).state in FAILED


def _done_elsewhere(ledger: Ledger, stage: str) -> bool:
    """Whether the stage was done by another job than the one that is recorded: whoever queued it was killed before that
    could be recorded, and nothing waits for it."""
    attempts = ledger.attempts.get(stage, ())
    return ledger.done(stage) and bool(attempts) and attempts[-1].job_id not in ("", ledger.jobs[stage])


def _attempt_of(ledger: Ledger, stage: str, job: str) -> int:
    """The newest attempt that began under the stage's last job; 0 where none did."""
    submitted = ledger.submissions.get(stage)
    count = ledger.attempt_count(stage)
    return count if submitted is None or count > submitted.after_attempt else 0


def _cause(ledger: Ledger, stage: str, attempt: int) -> str:
    settled = ledger.settled(stage).get(attempt)
    return settled.cause if settled else "unknown"
