"""The ledger of a run: its events, the outcomes and the beginnings of its attempts, read once, with the few questions
that more than one reader asks. It is a value: nothing here writes, and nothing asks Slurm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

from ftlib.runs import attempts, earlier, events, numbers
from ftlib.runs import outcome as outcomes
from ftlib.runs import overrides as override_events
from ftlib.runs.attempts import Attempt
from ftlib.runs.events import (
    Cancelled,
    CheckpointSaved,
    Decided,
    Event,
    Intended,
    Moved,
    Override,
    Progress,
    ResumeRequested,
    Settled,
    Submitted,
)
from ftlib.runs.outcome import Outcome
from ftlib.runs.overrides import Overrides

STAGES = ("prepare", "train", "export", "evaluate")
# Jobs of a run beside its stages: the recovery job, and the one that builds the image.
RECOVERY, IMAGE = "recovery", "image"
# In a sweep's own events: the arrays of some of its points.
ARRAYS = "arrays"

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Ledger:
    """What is recorded about one run."""

    events: tuple[Event, ...] = ()  # oldest first
    attempts: Mapping[str, Sequence[Attempt]] = field(default_factory=dict)  # stage -> its attempts, first one first
    outcomes: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)  # stage -> ends, first attempt first
    micro_batch: int | None = None  # rows of the training's micro-batch as planned; None where nothing is planned yet
    rows_of_a_rank: int | None = None  # rows that each rank contributes to an optimizer step

    # -- events ----------------------------------------------------------------------------------------------------

    def of(self, kind: type[E], stage: str | None = None) -> list[E]:
        """The events of one class (of one stage), oldest first."""
        events = cast("list[E]", self._by_kind.get(kind, []))
        return [event for event in events if stage is None or getattr(event, "stage", None) == stage]

    def with_events(self, *more: Event) -> Ledger:
        """This ledger as it would be after `more` had been recorded, now."""
        latest = max((event.time for event in self.events), default=0.0)
        added = tuple(dataclasses.replace(event, time=event.time or latest) for event in more)
        return dataclasses.replace(self, events=self.events + added)

    @cached_property
    def _by_kind(self) -> dict[type[Event], list[Event]]:
        by_kind: dict[type[Event], list[Event]] = {}
        for event in self.events:
            by_kind.setdefault(type(event), []).append(event)
        return by_kind

    # -- jobs ------------------------------------------------------------------------------------------------------

    @cached_property
    def submissions(self) -> dict[str, Submitted]:
        """Stage ("recovery", "image") -> its last submission. A run that was moved has none of before."""
        return {stage: cast(Submitted, self.events[index]) for stage, index in self.queue_order.items()}

    @cached_property
    def jobs(self) -> dict[str, str]:
        """Stage ("recovery", "image") -> the job it was last queued under."""
        return {stage: submission.job_id for stage, submission in self.submissions.items()}

    @cached_property
    def queue_order(self) -> dict[str, int]:
        """Stage ("recovery", "image") -> where in `events` its last submission is. Of two jobs in a chain, the one that
        waits for the other was queued after it."""
        order: dict[str, int] = {}
        for index, event in enumerate(self.events):
            if isinstance(event, Submitted):
                order[event.stage] = index
            elif isinstance(event, Moved):
                order = {}
        return order

    @cached_property
    def cancelled_since_request(self) -> bool:
        """Whether the owner has cancelled anything of the run since last asking for it to run."""
        cancelled = False
        for event in self.events:
            if isinstance(event, Cancelled):
                cancelled = True
            elif isinstance(event, ResumeRequested) or (isinstance(event, Submitted) and not event.automatic):
                cancelled = False
        return cancelled

    @cached_property
    def home(self) -> Path | None:
        """Where a resume found the run after it had been moved or copied; None where that never happened."""
        moves = self.of(Moved)
        return Path(moves[-1].to) if moves else None

    def request_index(self, stage: str) -> int:
        """Where in `events` the owner last asked for the stage to run (a submission, a resume): what ended before
        counts against no budget. 0 without one."""
        return max(
            (index for index, event in enumerate(self.events) if _is_request(event, stage)), default=0
        )  # fmt: skip

    def cancelled(self, stage: str, job_id: str) -> bool:
        """Whether the owner has cancelled that job of the stage, for good; of a stage without a job ("") until the
        owner wants the run to continue."""
        cancelled = False
        for event in self.events:
            if isinstance(event, Cancelled) and event.stage == stage and event.job_id == job_id:
                cancelled = True
            elif isinstance(event, ResumeRequested) and not job_id:
                cancelled = False
        return cancelled

    def superseded(self, stage: str, job_id: str) -> bool:
        """Whether another job was queued for the stage instead of `job_id`.

        A job can start before its submission is recorded. But where no intent to queue one has been open since the last
        submission, it came too late: sbatch had been tried again.
        """
        submitted = self.of(Submitted, stage)
        if any(event.job_id == job_id for event in submitted):
            return submitted[-1].job_id != job_id
        answered = {event.nonce for event in submitted}
        since = self.queue_order.get(stage, -1)
        # An intent from before was refused, or its job was given up.
        pending = any(
            isinstance(event, Intended) and event.stage == stage and event.nonce not in answered
            for event in self.events[since + 1 :]
        )
        # Tasks of an array are intended in their sweep's record.
        return bool(self.of(Intended, stage)) and not pending

    def resume_pending(self, stage: str) -> bool:
        """Whether the owner has asked the run to continue since the stage was last queued, and not cancelled it since.
        """
        pending = False
        for event in self.events:
            if isinstance(event, ResumeRequested):
                pending = True
            elif isinstance(event, (Submitted, Cancelled)) and event.stage == stage:
                pending = False
        return pending

    def overrides(self, now: float) -> Overrides:
        """What was changed since the run was submitted and holds at `now` (seconds since 1970)."""
        return override_events.fold(self.of(Override), now)

    # -- attempts --------------------------------------------------------------------------------------------------

    def done(self, stage: str) -> bool:
        """Whether some attempt of the stage has ended well."""
        return any(outcome.code == 0 for outcome in self.outcomes.get(stage, ()))

    @property
    def first_open(self) -> str | None:
        """The first stage that is not done; None where all are."""
        return next((stage for stage in STAGES if not self.done(stage)), None)

    @cached_property
    def by_attempt(self) -> dict[tuple[str, int], list[Event]]:
        """(stage, attempt) -> what was recorded of it, by itself and by others, oldest first."""
        by_attempt: dict[tuple[str, int], list[Event]] = {}
        for event in self.events:
            attempt = getattr(event, "attempt", None)
            if attempt is not None:
                by_attempt.setdefault((getattr(event, "stage", ""), attempt), []).append(event)
        return by_attempt

    def last(self, kind: type[E], stage: str, attempt: int) -> E | None:
        """The last event of a class about an attempt."""
        events = self.by_attempt.get((stage, attempt), ())
        return next((event for event in reversed(events) if isinstance(event, kind)), None)

    def attempt(self, stage: str, number: int) -> Attempt:
        """One attempt; where its file is gone, one of which nothing is known."""
        of_stage = self.attempts.get(stage, ())
        return next((one for one in of_stage if one.number == number), Attempt(stage=stage, number=number))

    def attempt_count(self, stage: str) -> int:
        """How many attempts of the stage have begun."""
        return len(self.attempts.get(stage, ()))

    def outcome(self, stage: str, attempt: int) -> Outcome | None:
        """How an attempt ended by its own account; None where it left no outcome."""
        return next((one for one in self.outcomes.get(stage, ()) if one.attempt == attempt), None)

    def settled(self, stage: str) -> dict[int, Settled]:
        """Attempt -> why it ended. The first finding stands: an epilogue saw more than any later process."""
        by_attempt: dict[int, Settled] = {}
        for event in self.of(Settled, stage):
            by_attempt.setdefault(event.attempt, event)
        return by_attempt

    def attempts_since_request(self, stage: str, *, up_to: int) -> dict[int, Settled]:
        """Attempt -> why it ended, of those that ended since the owner last asked for the stage; `up_to` included."""
        first = 1
        for event in self.events:
            if isinstance(event, Submitted) and event.stage == stage and not event.automatic:
                first = event.after_attempt + 1
            elif isinstance(event, ResumeRequested):
                first = event.after_attempts.get(stage, 0) + 1
        return {number: end for number, end in sorted(self.settled(stage).items()) if first <= number <= up_to}

    def smaller_micro_batch(self, rows: int) -> int:
        """The largest micro-batch of at most half of `rows` that divides what each rank contributes to a step."""
        whole = self.rows_of_a_rank or rows
        return next(size for size in range(rows // 2, 0, -1) if whole % size == 0)

    def decisions(self, stage: str) -> list[Decided]:
        """What was decided about the stage since its owner last asked for it, oldest first."""
        since = self.request_index(stage)
        return [event for event in self.events[since:] if isinstance(event, Decided) and event.stage == stage]

    def progressed(self, stage: str, attempt: int) -> bool:
        """Whether the attempt committed a checkpoint of a step that none before had reached, or other work."""
        if any(event.attempt == attempt for event in self.of(Progress, stage)):
            return True
        saves = [(event.attempt, event.step) for event in self.of(CheckpointSaved, stage)]
        reached = max((step for number, step in saves if number < attempt), default=0)
        return any(step > reached for number, step in saves if number == attempt)


def _is_request(event: Event, stage: str) -> bool:
    if isinstance(event, ResumeRequested):
        return True
    return isinstance(event, Submitted) and event.stage == stage and not event.automatic


def read(run: Path) -> Ledger:
    """The ledger of the run folder `run`; empty where nothing was recorded yet."""
    folder = str(run)  # to make a Path of each name takes long where runs are thousands
    by_stage: dict[str, list[Outcome]] = {}
    for outcome in outcomes.read(f"{folder}/outcomes"):
        by_stage.setdefault(outcome.stage, []).append(outcome)
    recorded = events.read(f"{folder}/events")
    micro_batch, rows_of_a_rank = None, None
    # Thousands of runs are read for one look at them: the plan only where its figures decide something.
    if any(isinstance(event, Settled) and event.cause == "GPU memory" for event in recorded):
        micro_batch, rows_of_a_rank = numbers.batch(run, override_events.fold(recorded, now=0.0).nodes)
    return Ledger(
        micro_batch=micro_batch,
        rows_of_a_rank=rows_of_a_rank,
        events=(*earlier.adjustments(folder, recorded), *recorded),
        attempts=attempts.read(f"{folder}/lives"),
        outcomes={stage: tuple(ends) for stage, ends in by_stage.items()},
    )


def jobs_of(ledgers: Iterable[Ledger]) -> set[str]:
    """The jobs of all stages of `ledgers` that are not done: what Slurm has to be asked about."""
    return {
        job for ledger in ledgers for stage, job in ledger.jobs.items() if stage in STAGES and not ledger.done(stage)
    }


def open_stages(ledger: Ledger, stages: Sequence[str] = STAGES) -> list[str]:
    """Those of `stages` that are not done, in order."""
    return [stage for stage in stages if not ledger.done(stage)]
