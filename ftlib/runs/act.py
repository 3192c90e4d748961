"""Act upon the one decision: what the prologue, the epilogue, the recovery job and the owner's commands do.

Each finds out why attempts have ended and records it, asks `decide.next_action`, records its decision, and only then
does what was decided. Killed anywhere in between, whoever comes next decides the same again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from ftlib.errors import Unavailable
from ftlib.runs import chain, decide
from ftlib.runs.decide import Action, Nothing, QueueAnew, Stop
from ftlib.runs.events import ResumeRequested, Settled, Settler
from ftlib.runs.ledger import RECOVERY, STAGES, Ledger, jobs_of, open_stages
from ftlib.runs.scheduler import WAITING, Controller, Here, Scheduler, SchedulerView
from ftlib.runs.store import Record, RunStore

# Finds out why an attempt ended: the ledger, a stage, an attempt's number, who asks.
Investigate = Callable[[Ledger, str, int, Settler], Settled]
# Waiting for a controller that does not accept a requeue: 1, 2, 4, … seconds, the longest this.
LONGEST_WAIT_S = 256
REQUEUED, SUPERSEDED = "requeued", "superseded"
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


def begin_attempt(
    run: Record, controller: Controller, here: Here, investigate: Investigate, *,
    clock: Callable[[], float] = time.time,
) -> Action:  # fmt: skip
    """What a prologue does: settle what no epilogue saw, and learn whether the attempt may begin (`Nothing`, not
    superseded) or the job must end (`Stop`, or superseded)."""
    return _decide_inside(run, controller, here, investigate, by="prologue", clock=clock)


def end_attempt(
    run: Record, controller: Controller, here: Here, investigate: Investigate, *,
    clock: Callable[[], float] = time.time,
) -> Action:  # fmt: skip
    """What an epilogue does before it acts: settle its attempt, decide, and record the decision."""
    return _decide_inside(run, controller, here, investigate, by="epilogue", clock=clock)


def _decide_inside(
    run: Record, controller: Controller, here: Here, investigate: Investigate, *, by: Literal["prologue", "epilogue"],
    clock: Callable[[], float],
) -> Action:  # fmt: skip
    writer = f"{here.stage}-{here.attempt}-{by}"
    view = SchedulerView.inside(here, controller.state(here.job_id))
    ledger = settle(run, view, investigate, by, writer)
    action = decide.next_action(ledger, view, clock())
    if action.events():
        run.record(*action.events(), writer=writer)
    return action


def requeue(
    controller: Controller, job_id: str, changes: dict[str, str], *, restarts: int | None = None,
    report: Callable[[str], None], sleep: Callable[[float], None] = time.sleep,
) -> str:  # fmt: skip
    """Requeue the job that runs this, and change what its next attempt asks for.

    restarts: how often the job had been requeued when this start of it began; None where that is not known.
    Returns REQUEUED, "CANCELLED" where its owner has cancelled it meanwhile, "superseded" where Slurm has requeued it
    already, or "refused" (after eight minutes where the controller does not answer): the recovery job takes over then.
    Slurm refuses changes while a job runs, and accepts them right after the requeue.
    """
    wait_s = 1
    while wait_s <= LONGEST_WAIT_S:
        # Slurm may have given up this node meanwhile: the job's next start, elsewhere, must not be ended.
        if _restarted(controller, job_id, restarts):
            report("Slurm has requeued the job already")
            return SUPERSEDED
        # Incomplete leaves a job alone that its owner has cancelled; a plain requeue would revive it.
        if controller.requeue(job_id, incomplete_only=True):
            # That is accepted, without effect, of a job that was cancelled or is at its time limit, too (22.05, 26.05).
            # A change is accepted only of one that goes back to the queue; this one changes nothing. Where the
            # controller fell silent in between, its count of restarts tells.
            back_in_queue = controller.update(job_id, {"Requeue": "1"}) or _restarted(controller, job_id, restarts)
            if not back_in_queue:
                report("the job was cancelled, or its time limit is over: it was not requeued")
                return "refused"
            if changes and not controller.update(job_id, changes):
                report(f"the requeued job was not changed: {changes}")
            return REQUEUED
        if controller.state(job_id) == "CANCELLED":
            return "CANCELLED"
        report(f"the requeue was not accepted; trying again in {wait_s} s")
        sleep(wait_s)
        wait_s *= 2
    return "refused"


def _restarted(controller: Controller, job_id: str, before: int | None) -> bool:
    """Whether the job was requeued since its count of restarts was `before` (None: not known)."""
    return before is not None and before < (controller.restarts(job_id) or 0)


def recover(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], investigate: Investigate, *,
    by: Settler = "recovery job", image_job: Callable[[], str | None] = lambda: None,
    clock: Callable[[], float] = time.time,
) -> Action:  # fmt: skip
    """Do what is due about a run whose jobs have ended, without a request of its owner's."""
    return _advance(
        run, scheduler, jobs, investigate, by=by, request=None, image_job=image_job, clock=clock
    )  # fmt: skip


def resume(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], investigate: Investigate, *,
    user: str | None, even_cancelled: bool = True, image_job: Callable[[], str | None] = lambda: None,
    on_adopted: Callable[[Sequence[str]], None] = lambda stages: None, clock: Callable[[], float] = time.time,
) -> Action:  # fmt: skip
    """Do what the owner's request to continue asks for; `even_cancelled`: also where the run was cancelled.
    `on_adopted` is told of which stages the jobs of a killed submit were found.

    Of a job that was cancelled and is still ending it is `Nothing` with the cause "cancelled", not `over`: the owner
    has to wait.
    """
    request = ResumeRequested(user=user)
    return _advance(
        run, scheduler, jobs, investigate, by="owner", request=request, even_cancelled=even_cancelled,
        image_job=image_job, on_adopted=on_adopted, clock=clock,
    )  # fmt: skip


def cancel(run: RunStore, scheduler: Scheduler, *, user: str | None) -> list[str]:
    """End the run's jobs for good; returns the stages that will not run now, none where nothing could have run them.

    A run whose job has just ended, and whose recovery job is about to queue it anew, is cancelled, too.
    """
    with run.claim():
        chain.adopt(run, scheduler)
        ledger = run.ledger()
        view = _look(scheduler, ledger)
        # Other points of a sweep wait for the job that prepares their common dataset.
        shared = [stage for stage, submitted in ledger.submissions.items() if submitted.prepared_by is not None]
        stages = [stage for stage in open_stages(ledger) if stage not in shared]
        jobs = {stage: ledger.jobs.get(stage, "") for stage in (*stages, RECOVERY)}
        active = [job for job in jobs.values() if view.active(job)]
        if not stages or not active:
            return []
        chain.cancel(run, scheduler, jobs, user, active=active)
        return stages


def _advance(
    run: RunStore, scheduler: Scheduler, jobs: Sequence[Sequence[str]], investigate: Investigate, *, by: Settler,
    request: ResumeRequested | None, image_job: Callable[[], str | None], even_cancelled: bool = False,
    on_adopted: Callable[[Sequence[str]], None] = lambda stages: None,
    clock: Callable[[], float],
) -> Action:  # fmt: skip
    """Under the run's claim: adopt, settle, decide, record, act."""
    # A submit that was killed on a login node leaves a claim, and a job elsewhere cannot see that its process is gone.
    claim = run.claim() if request else run.claim(wait_s=CLAIM_S, silent_s=CLAIM_S)
    with claim:
        if adopted := chain.adopt(run, scheduler):
            on_adopted(adopted)
        view = _look(scheduler, run.ledger())
        ledger = settle(run, view, investigate, by)
        action = decide.next_action(ledger, view, clock())
        if request and _needs_request(action) and (even_cancelled or action.cause != "cancelled"):
            attempts = {stage: ledger.attempt_count(stage) for stage in STAGES}
            run.record(ResumeRequested(user=request.user, after_attempts=attempts))
            ledger = run.ledger()
            action = decide.next_action(ledger, view, clock())
        if action.events():
            run.record(*action.events())
        if isinstance(action, QueueAnew):
            scheduler.cancel(action.obsolete_jobs)
            active = _active(ledger, view, but=action.stages)
            chain.queue(run, scheduler, jobs, active, automatic=request is None, after=image_job())
        elif isinstance(action, Nothing) and action.under_way:
            # Its recovery job may have run, or was never queued.
            chain.queue(run, scheduler, jobs, _active(ledger, view), automatic=request is None)
        return action


def _active(ledger: Ledger, view: SchedulerView, *, but: Sequence[str] = ()) -> dict[str, str]:
    """Stage -> its job that is queued or running; "recovery" -> the recovery job that waits for all of them."""
    active = {
        stage: job for stage, job in ledger.jobs.items()
        if stage in STAGES and stage not in but and view.active(job) and not ledger.done(stage)
    }  # fmt: skip
    newest = max((ledger.queue_order[stage] for stage in active), default=0)
    recovery = ledger.jobs.get(RECOVERY)
    if recovery and view.job(recovery).state in WAITING and ledger.queue_order[RECOVERY] > newest:
        active[RECOVERY] = recovery
    return active


def _needs_request(action: Action) -> bool:
    """Whether only the owner's word makes the run continue: it was stopped, or cancelled and has ended."""
    if isinstance(action, Nothing):
        return action.over
    # A stage that was never queued needs no more than the submission itself.
    return isinstance(action, Stop) or bool(action.job_id)


def _look(scheduler: Scheduler, ledger: Ledger) -> SchedulerView:
    """What Slurm says of the run's jobs; Unavailable where the controller does not answer."""
    # Of done stages, too: why a job was cancelled shows in the end of the one before it.
    view = scheduler.look(jobs_of([ledger]) | set(ledger.jobs.values()))
    if not view.answered:
        raise Unavailable("Slurm does not answer, so nothing is known of the run's jobs")
    return view
