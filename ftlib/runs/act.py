"""Act upon the one decision: what the prologue, the epilogue, the recovery job and the owner's commands do.

Each finds out why attempts have ended and records it, asks `decide.next_action`, records its decision, and only then
does what was decided. Killed anywhere in between, whoever comes next decides the same again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ftlib.runs import chain, decide
from ftlib.runs.decide import Action, Nothing, QueueAnew, Stop
from ftlib.runs.events import ResumeRequested, Settled, Settler
from ftlib.runs.ledger import STAGES, Ledger, jobs_of
from ftlib.runs.scheduler import Controller, Here, Scheduler, SchedulerView
from ftlib.runs.store import Record, RunStore

# Finds out why an attempt ended: the ledger, a stage, an attempt's number, who asks.
Investigate = Callable[[Ledger, str, int, Settler], Settled]
# Waiting for a controller that does not accept a requeue: 1, 2, 4, … seconds, the longest this.
LONGEST_WAIT_S = 256
REQUEUED = "requeued"
# Longer than any submit holds its claim without touching it.
CLAIM_S = 300.0


def settle(
    run: Record, view: SchedulerView, investigate: Investigate, by: Settler, writer: str | None = None
) -> Ledger:
    """Record why each attempt ended of which that is not recorded yet; returns the ledger then."""
    ledger = run.ledger()
    ends = [investigate(ledger, stage, attempt, by) for stage, attempt in decide.open_ends(ledger, view)]
    if not ends:
        return ledger
    run.record(*ends, writer=writer)
    return run.ledger()


def begin_attempt(run: Record, controller: Controller, here: Here, investigate: Investigate) -> Action:
    """What a prologue does: settle what no epilogue saw, and learn whether the attempt may begin (`Nothing`, not
    superseded) or the job must end (`Stop`, or superseded)."""
    writer = f"{here.stage}-{here.attempt}-prologue"
    view = SchedulerView.inside(here, controller.state(here.job_id))
    ledger = settle(run, view, investigate, "prologue", writer)
    action = decide.next_action(ledger, view, time.time())
    if action.events():
        run.record(*action.events(), writer=writer)
    return action


def end_attempt(run: Record, controller: Controller, here: Here, investigate: Investigate) -> Action:
    """What an epilogue does before it acts: settle its attempt, decide, and record the decision."""
    writer = f"{here.stage}-{here.attempt}-epilogue"
    view = SchedulerView.inside(here, controller.state(here.job_id))
    ledger = settle(run, view, investigate, "epilogue", writer)
    action = decide.next_action(ledger, view, time.time())
    if action.events():
        run.record(*action.events(), writer=writer)
    return action


def requeue(
    controller: Controller, job_id: str, changes: dict[str, str], *, report: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> str:  # fmt: skip
    """Requeue the job that runs this, and change what its next attempt asks for.

    Returns REQUEUED, "CANCELLED" where its owner has cancelled it meanwhile, or "refused" after eight minutes: the
    recovery job takes over then. Slurm refuses changes while a job runs, and accepts them right after the requeue.
    """
    wait_s = 1
    while wait_s <= LONGEST_WAIT_S:
        # Incomplete leaves a job alone that its owner has cancelled; a plain requeue would revive it.
        accepted = controller.requeue(job_id, incomplete_only=True)
        if not accepted:
            state = controller.state(job_id)
            if state == "CANCELLED":
                return state
            # The controller forgets a job at its time limit to be incomplete; only then we insist.
            accepted = state == "TIMEOUT" and controller.requeue(job_id, incomplete_only=False)
        if accepted:
            if changes and not controller.update(job_id, changes):
                report(f"the requeued job was not changed: {changes}")
            return REQUEUED
        report(f"the requeue was not accepted; trying again in {wait_s} s")
        sleep(wait_s)
        wait_s *= 2
    return "refused"


def recover(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], investigate: Investigate, *,
    by: Settler = "recovery job", image_job: Callable[[], str | None] = lambda: None,
) -> Action:  # fmt: skip
    """Do what is due about a run whose jobs have ended, without a request of its owner's."""
    return _advance(run, scheduler, jobs, investigate, by=by, request=None, image_job=image_job)


def resume(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], investigate: Investigate, *,
    user: str | None, even_cancelled: bool = True, image_job: Callable[[], str | None] = lambda: None,
    on_adopted: Callable[[Sequence[str]], None] = lambda stages: None,
) -> Action:  # fmt: skip
    """Do what the owner's request to continue asks for; `even_cancelled`: also where the run was cancelled.
    `on_adopted` is told of which stages the jobs of a killed submit were found.

    Of a job that was cancelled and is still ending it is `Nothing` with the cause "cancelled", not `over`: the owner
    has to wait.
    """
    request = ResumeRequested(user=user)
    return _advance(
        run, scheduler, jobs, investigate, by="owner", request=request, even_cancelled=even_cancelled,
        image_job=image_job, on_adopted=on_adopted,
    )  # fmt: skip


def _advance(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], investigate: Investigate, *, by: Settler,
    request: ResumeRequested | None, image_job: Callable[[], str | None], even_cancelled: bool = False,
    on_adopted: Callable[[Sequence[str]], None] = lambda stages: None,
) -> Action:  # fmt: skip
    """Under the run's claim: adopt, settle, decide, record, act."""
    # A submit that was killed on a login node leaves a claim, and a job elsewhere cannot see that its process is gone.
    claim = run.claim() if request else run.claim(wait_s=CLAIM_S, silent_s=CLAIM_S)
    with claim:
        if adopted := chain.adopt(run, scheduler):
            on_adopted(adopted)
        view = scheduler.look(_all_jobs(run.ledger()))
        ledger = settle(run, view, investigate, by)
        action = decide.next_action(ledger, view, time.time())
        if request and _needs_request(action) and (even_cancelled or action.cause != "cancelled"):
            attempts = {stage: ledger.attempt_count(stage) for stage in STAGES}
            run.record(ResumeRequested(user=request.user, after_attempts=attempts))
            ledger = run.ledger()
            action = decide.next_action(ledger, view, time.time())
        if action.events():
            run.record(*action.events())
        if isinstance(action, QueueAnew):
            scheduler.cancel(action.obsolete_jobs)
            active = {
                stage: job for stage, job in ledger.jobs.items()
                if stage in STAGES and stage not in action.stages and view.active(job) and not ledger.done(stage)
            }  # fmt: skip
            chain.queue(run, scheduler, jobs, active, automatic=request is None, after=image_job())
        return action


def _needs_request(action: Action) -> bool:
    """Whether only the owner's word makes the run continue: it was stopped, or cancelled and has ended."""
    if isinstance(action, Nothing):
        return action.over
    # A stage that was never queued needs no more than the submission itself.
    return isinstance(action, Stop) or bool(action.job_id)


def _all_jobs(ledger: Ledger) -> set[str]:
    # Of done stages, too: why a job was cancelled shows in the end of the one before it.
    return jobs_of([ledger]) | set(ledger.jobs.values())

