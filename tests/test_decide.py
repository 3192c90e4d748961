"""The one decision, by examples: a ledger, what Slurm says, and what is done then. Pure: nothing is read or run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from ftlib.runs.attempts import Attempt
from ftlib.runs.decide import (
    Action,
    Leave,
    Nothing,
    QueueAnew,
    Requeue,
    Stop,
    next_action,
    open_ends,
    with_unknown_ends,
)
from ftlib.runs.events import (
    Cancelled,
    CheckpointSaved,
    Decided,
    Event,
    Intended,
    Override,
    ResumeRequested,
    Settled,
    Submitted,
)
from ftlib.runs.ledger import STAGES, Ledger
from ftlib.runs.outcome import Outcome
from ftlib.runs.scheduler import Here, Job, SchedulerView

NOW = 1_800_000_000.0
# Stage -> its job where the whole chain was queued once.
JOBS = {"prepare": "1", "train": "2", "export": "3", "evaluate": "3"}


def ledger(
    *events: Event, done: Sequence[str] = ("prepare",), attempts: int = 1, outcome: int | None = None,
    queued: Sequence[str] = STAGES,
) -> Ledger:  # fmt: skip
    """A run whose chain is queued, whose stages `done` have ended well, and whose next stage has begun `attempts`
    times, the last of which left the outcome code `outcome`."""
    stage = next(name for name in STAGES if name not in done)
    outcomes = {name: (Outcome(name, 1, 0, "done"),) for name in done}
    if outcome is not None:
        outcomes[stage] = (Outcome(stage, attempts, outcome, "interrupted"),)
    submitted = [Submitted(stage=name, job_id=JOBS[name], mem_mib=4000, node_mem_mib=7000) for name in queued]
    submitted += [Submitted(stage="recovery", job_id="9")] if queued else []
    begun = {name: (Attempt(name, 1, JOBS[name]),) for name in done}
    begun[stage] = tuple(Attempt(stage, number, JOBS[stage]) for number in range(1, attempts + 1))
    return Ledger((*submitted, *events), begun, outcomes, micro_batch=8, rows_of_a_rank=16)


def settled(cause: str, attempt: int = 1, stage: str = "train", **fields: object) -> Settled:
    return Settled(stage=stage, attempt=attempt, job_id="2", cause=cause, by="epilogue", **fields)  # type: ignore[arg-type]


def saved(attempt: int, step: int) -> CheckpointSaved:
    return CheckpointSaved(stage="train", attempt=attempt, step=step)


def view(**states: str) -> SchedulerView:
    """What Slurm says of the jobs of stages (`train="FAILED"`); it knows no other."""
    return SchedulerView(jobs={JOBS[stage]: Job(state) for stage, state in states.items()})


def inside(
    attempt: int, *, ended: bool = True, state: str = "RUNNING", may_requeue: bool = True, job: str = "2"
) -> SchedulerView:
    here = Here(job_id=job, stage="train", attempt=attempt, ended=ended, may_requeue=may_requeue)
    return SchedulerView.inside(here, state)


def action(known: Ledger, seen: SchedulerView) -> Action:
    """What is done; whatever is open has been settled before, as every caller does."""
    assert open_ends(known, seen) == []
    return next_action(known, seen, NOW)


# -- in the epilogue and the prologue ----------------------------------------------------------------------------------


def test_an_interrupted_attempt_is_requeued_and_says_why() -> None:
    decided = action(ledger(saved(1, 10), settled("preemption"), outcome=75), inside(1))
    assert isinstance(decided, Requeue) and decided.cause == "preemption" and decided.changes == ()
    (event,) = decided.events()
    assert isinstance(event, Decided) and (event.choice, event.attempt, event.job_id) == ("requeue", 1, "2")


def test_where_the_site_forbids_requeueing_it_is_left_to_the_recovery_job() -> None:
    known = ledger(saved(1, 10), settled("host memory"))
    left = action(known, inside(1, may_requeue=False))
    assert isinstance(left, Leave)
    (override, _) = left.events()
    assert isinstance(override, Override) and (override.field, override.value) == ("memory_mib.train", 6000)
    anew = action(known.with_events(*left.events()), view(prepare="COMPLETED", train="FAILED", export="CANCELLED"))
    assert isinstance(anew, QueueAnew) and anew.stages == ("train", "export", "evaluate")
    assert anew.changes == (), "what the epilogue has recorded is not applied twice"


def test_memory_grows_to_what_a_node_has_and_then_the_run_stops() -> None:
    known = ledger(saved(1, 10), settled("host memory"))
    known = known.with_events(*action(known, inside(1)).events())
    begun = {**known.attempts, "train": (Attempt("train", 1, "2"), Attempt("train", 2, "2"))}
    known = Ledger((*known.events, saved(2, 20), settled("host memory", 2)), begun, known.outcomes)
    grown = action(known, inside(2))
    assert isinstance(grown, Requeue) and [change.value for change in grown.changes] == [7000]
    begun["train"] = (*begun["train"], Attempt("train", 3, "2"))
    known = Ledger((*known.events, *grown.events(), saved(3, 30), settled("host memory", 3)), begun, known.outcomes)
    assert isinstance(action(known, inside(3)), Stop)


def test_gpu_memory_halves_the_micro_batch_as_an_override() -> None:
    decided = action(ledger(saved(1, 10), settled("GPU memory", line="CUDA out of memory")), inside(1))
    (override,) = decided.changes
    assert (override.field, override.value, override.why) == ("train.micro_batch", 4, "CUDA out of memory")


def test_a_bad_gpu_leaves_its_node_out_for_a_day() -> None:
    (override,) = action(ledger(settled("bad GPU", node="n2")), inside(1)).changes
    assert (override.field, override.value, override.until) == ("exclude.n2", True, NOW + 86400)


@pytest.mark.parametrize("ended", [True, False])
def test_a_cancelled_job_is_neither_requeued_nor_begun(ended: bool) -> None:
    events = [Cancelled(stage="train", job_id="2"), settled("cancelled")]
    stopped = action(ledger(*events, attempts=1 if ended else 2), inside(1 if ended else 2, ended=ended))
    assert isinstance(stopped, Stop) and stopped.cause == "cancelled"
    by_slurm = action(ledger(settled("preemption")), inside(1, state="CANCELLED"))
    assert isinstance(by_slurm, Stop) and any(isinstance(event, Cancelled) for event in by_slurm.events())


def test_an_attempt_that_was_overtaken_leaves() -> None:
    later_attempt = action(ledger(settled("node failure"), attempts=2), inside(1))
    assert isinstance(later_attempt, Nothing) and later_attempt.superseded
    later_job = ledger(settled("node failure"), Submitted(stage="train", job_id="7", after_attempt=1))
    decided = action(later_job, inside(1))
    assert isinstance(decided, Nothing) and decided.superseded


def test_a_job_that_starts_before_its_submission_is_recorded_begins() -> None:
    decided = action(ledger(settled("preemption"), attempts=2), inside(2, ended=False, job="7"))
    assert isinstance(decided, Nothing) and not decided.superseded


def test_what_slurm_requeued_by_itself_does_not_begin_beyond_its_budget() -> None:
    ends = [settled("node failure", number) for number in range(1, 11)]
    assert isinstance(action(ledger(*ends, attempts=11), inside(11, ended=False)), Stop)
    assert isinstance(action(ledger(*ends[:9], attempts=10), inside(10, ended=False)), Nothing)


def test_the_code_of_a_stopped_job_is_its_outcome() -> None:
    stopped = action(ledger(settled("input"), outcome=64), inside(1))
    assert isinstance(stopped, Stop) and stopped.code == 64


# -- in the recovery job and on a login node ---------------------------------------------------------------------------


def test_a_new_run_is_queued_whole_and_a_cut_submission_is_completed() -> None:
    decided = next_action(ledger(done=(), attempts=0, queued=()), view(), NOW)
    assert isinstance(decided, QueueAnew) and decided.stages == STAGES and decided.events() == ()
    cut = next_action(ledger(queued=STAGES[:2]), view(prepare="COMPLETED", train="RUNNING"), NOW)
    assert isinstance(cut, QueueAnew) and cut.stages == ("export", "evaluate")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD"])
def test_nothing_is_done_while_the_job_waits_or_runs(state: str) -> None:
    assert isinstance(action(ledger(), view(train=state)), Nothing)


def test_nothing_is_done_when_all_is_done_or_slurm_does_not_answer() -> None:
    finished = Ledger(outcomes={stage: (Outcome(stage, 1, 0, ""),) for stage in STAGES})
    assert next_action(finished, SchedulerView(), NOW).message == "every stage is done"
    silent = next_action(ledger(), SchedulerView(answered=False), NOW)
    assert isinstance(silent, Nothing) and "does not answer" in silent.message


def test_a_killed_batch_shell_is_recovered_within_its_budget() -> None:
    anew = action(ledger(saved(1, 10), settled("killed")), view(train="FAILED"))
    assert isinstance(anew, QueueAnew) and anew.job_id == "2"
    barren = [settled("killed", number) for number in (1, 2, 3)]
    stopped = action(ledger(*barren, attempts=3), view(train="FAILED"))
    assert isinstance(stopped, Stop)
    # Whoever asks next learns that it was stopped, and only its owner changes that.
    after = ledger(*barren, *stopped.events(), attempts=3)
    said = action(after, view(train="FAILED"))
    assert isinstance(said, Nothing) and said.over
    resumed = action(after.with_events(ResumeRequested(after_attempts={"train": 3})), view(train="FAILED"))
    assert isinstance(resumed, QueueAnew)


def test_a_plain_scancel_is_not_revived_and_recorded() -> None:
    stopped = action(ledger(settled("cancelled")), view(prepare="COMPLETED", train="CANCELLED"))
    assert isinstance(stopped, Stop) and isinstance(stopped.events()[0], Cancelled)
    said = action(ledger(settled("cancelled"), *stopped.events()), view(train="CANCELLED"))
    assert isinstance(said, Nothing) and said.over and said.cause == "cancelled"


def test_slurm_cancels_what_depends_on_a_failed_job_of_a_stage_that_was_done() -> None:
    decided = action(ledger(done=("prepare", "train"), attempts=0), view(train="FAILED", export="CANCELLED"))
    assert isinstance(decided, QueueAnew) and decided.stages == ("export", "evaluate")


def test_where_slurm_has_forgotten_how_the_job_ended_it_may_have_been_cancelled() -> None:
    known = ledger(saved(1, 10), settled("preemption"))
    assert isinstance(action(known, view()), Stop)
    # An epilogue saw that it was not.
    left = known.with_events(Decided(stage="train", attempt=1, job_id="2", choice="leave"))
    assert isinstance(action(left, view()), QueueAnew)
    # Its log tells.
    assert isinstance(action(ledger(saved(1, 10), settled("GPU memory")), view()), QueueAnew)


def test_jobs_that_end_before_they_begin_stop_after_three() -> None:
    failed = view(train="FAILED", export="PENDING")
    anew = action(ledger(attempts=0), failed)
    assert isinstance(anew, QueueAnew) and anew.obsolete_jobs == ("3",)
    again = [Submitted(stage="train", job_id=job, automatic=True) for job in ("2", "2")]
    assert isinstance(action(ledger(*again, attempts=0), failed), Stop)


def test_a_person_who_resumes_begins_the_count_anew() -> None:
    ends = [settled("killed", number) for number in (1, 2, 3)]
    resumed = Submitted(stage="train", job_id="2", after_attempt=3)
    assert isinstance(action(ledger(*ends, resumed, settled("killed", 4), attempts=4), inside(4)), Requeue)
    # The recovery job is no person.
    by_recovery = Submitted(stage="train", job_id="2", after_attempt=3, automatic=True)
    assert isinstance(action(ledger(*ends, by_recovery, settled("killed", 4), attempts=4), inside(4)), Stop)


def test_who_cancels_after_a_resume_that_was_refused_wants_it_cancelled() -> None:
    """sbatch refused what the resume would have queued, and the owner gave up (seed 40896 of the simulation)."""
    refused = ledger(Cancelled(stage="train", job_id="2"), ResumeRequested(after_attempts={"train": 1}))
    assert isinstance(next_action(refused, view(train="CANCELLED"), NOW), QueueAnew)
    decided = next_action(refused.with_events(Cancelled(stage="train", job_id="2")), view(train="CANCELLED"), NOW)
    assert isinstance(decided, Nothing) and decided.over and decided.cause == "cancelled"


def test_every_attempt_without_a_recorded_cause_is_open_until_it_is_settled() -> None:
    known = ledger(settled("preemption"), attempts=3, outcome=75)
    assert open_ends(known, inside(3)) == [("train", 2), ("train", 3)]
    assert open_ends(known, inside(3, ended=False)) == [("train", 2)]
    assert open_ends(known, view(train="RUNNING")) == [("train", 2)]
    assert open_ends(known, view(train="FAILED")) == [("train", 2), ("train", 3)]
    assert open_ends(known, SchedulerView(answered=False)) == [("train", 2)]


# -- found by the simulation -------------------------------------------------------------------------------------------


def test_a_preempted_job_that_slurm_does_not_requeue_has_ended() -> None:
    anew = action(ledger(saved(1, 10), settled("preemption")), view(prepare="COMPLETED", train="PREEMPTED"))
    assert isinstance(anew, QueueAnew) and anew.cause == "preemption"


def requeued_alone(*events: Event, done: Sequence[str] = ("prepare",), attempts: int = 1) -> Ledger:
    """A chain of which only the training was queued anew, as job 7, before that submission was killed or refused."""
    again = Submitted(stage="train", job_id="7", after_attempt=1, automatic=True)
    return ledger(settled("node failure"), again, *events, done=done, attempts=attempts)


def test_what_waited_for_a_job_that_was_queued_anew_is_queued_anew_too() -> None:
    seen = SchedulerView(jobs={"7": Job("RUNNING"), "3": Job("PENDING"), "2": Job("NODE_FAIL")})
    anew = action(requeued_alone(), seen)
    assert isinstance(anew, QueueAnew) and anew.stages == ("export", "evaluate") and anew.obsolete_jobs == ("3",)
    assert anew.events() == (), "nothing has ended"


def test_a_stage_that_slurm_cancelled_in_an_earlier_chain_was_not_cancelled_by_its_owner() -> None:
    known = requeued_alone(done=("prepare", "train"), attempts=0)
    anew = action(known, SchedulerView(jobs={"7": Job("COMPLETED"), "2": Job("NODE_FAIL"), "3": Job("CANCELLED")}))
    assert isinstance(anew, QueueAnew) and anew.stages == ("export", "evaluate")


def test_a_run_that_was_cancelled_while_its_job_ended_well_does_not_continue() -> None:
    cancelled = Cancelled(stage="train", job_id="7")
    known = requeued_alone(cancelled, done=("prepare", "train"), attempts=0)
    over = action(known, SchedulerView(jobs={"7": Job("CANCELLED"), "3": Job("CANCELLED")}))
    assert isinstance(over, Nothing) and over.over and over.cause == "cancelled"


def test_a_change_that_was_recorded_without_its_decision_is_not_made_twice() -> None:
    decided = action(ledger(settled("GPU memory")), inside(1))
    change, _ = decided.events()
    killed_then = ledger(settled("GPU memory"), change)
    again = action(killed_then, view(prepare="COMPLETED", train="FAILED"))
    assert isinstance(again, QueueAnew) and again.changes == ()


def test_a_job_that_was_requeued_and_then_forgotten_may_have_been_cancelled() -> None:
    requeued = Decided(stage="train", attempt=1, job_id="2", choice="requeue")
    assert isinstance(action(ledger(saved(1, 10), settled("GPU memory"), requeued), view()), Stop)


def test_a_job_of_a_submission_that_another_job_has_answered_came_too_late() -> None:
    intended = Intended(stage="train", nonce="n")
    answered = Submitted(stage="train", job_id="7", nonce="n", after_attempt=1)
    known = ledger(settled("node failure"), intended, answered)
    late = action(known, inside(2, ended=False, job="8"))
    assert isinstance(late, Nothing) and late.superseded
    # Before the submission is recorded a job may start, too.
    early = action(ledger(settled("node failure"), intended), inside(2, ended=False, job="8"))
    assert isinstance(early, Nothing) and not early.superseded


def test_a_refused_submission_does_not_hide_that_a_job_came_too_late() -> None:
    refused, intended = Intended(stage="train", nonce="refused"), Intended(stage="train", nonce="n")
    answered = Submitted(stage="train", job_id="7", nonce="n", after_attempt=1)
    late = action(ledger(settled("node failure"), refused, intended, answered), inside(2, ended=False, job="8"))
    assert isinstance(late, Nothing) and late.superseded


def test_what_waited_for_a_job_that_was_replaced_was_not_cancelled_by_the_owner() -> None:
    """The recovery job was killed before it recorded the export's new job, which then did the export."""
    known = ledger(done=("prepare", "train", "export"), attempts=0)
    jobs = {"prepare": "1", "train": "2", "export": "8", "evaluate": "4"}
    begun = {stage: (Attempt(stage, 1, jobs[stage]),) for stage in ("prepare", "train", "export")}
    again = replace(known, attempts=begun).with_events(Submitted(stage="evaluate", job_id="4", time=NOW))
    seen = SchedulerView(jobs={"3": Job("CANCELLED"), "4": Job("CANCELLED")})
    decided = action(again, seen)
    assert isinstance(decided, QueueAnew) and decided.stages == ("evaluate",)


def test_before_an_attempt_takes_its_number_all_others_have_ended() -> None:
    assert open_ends(ledger(attempts=2), inside(3, ended=False)) == [("train", 1), ("train", 2)]


def test_who_only_looks_takes_an_end_without_a_cause_for_unknown() -> None:
    seen = view(prepare="COMPLETED", train="FAILED")
    known = with_unknown_ends(ledger(saved(1, 10)), seen)
    assert isinstance(next_action(known, seen, NOW), QueueAnew)
