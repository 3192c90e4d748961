"""What must hold in every history, whatever is injected."""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import TYPE_CHECKING, Any, cast

from benchmarks.simulate.slurm import Job
from ftlib.errors import FtError
from ftlib.runs import comments, decide, policy
from ftlib.runs.decide import MOST_STILLBORN, Nothing, QueueAnew, Stop
from ftlib.runs.diagnosis import Cause
from ftlib.runs.events import Cancelled, Decided, Intended, Override, ResumeRequested, Settled, Submitted
from ftlib.runs.ledger import RECOVERY, STAGES, Ledger
from ftlib.runs.scheduler import Job as SeenJob
from ftlib.runs.scheduler import SchedulerView

if TYPE_CHECKING:
    from benchmarks.simulate.world import Truth, World

# Which changes follow from which causes.
CAUSE_OF_CHANGE = {"train.micro_batch": "GPU memory", "exclude": "bad GPU", "memory_mib": "host memory"}
# Writers of the processes that the owner starts.
BY_OWNER = ("submit", "resume")
# A prologue has asked no longer than that before its attempt begins, in seconds.
PROLOGUE_S = 10.0
# What a process may end with besides our own errors: the disk is full.
EXPECTED = (FtError, OSError)


class Watch:
    """Looks on while a history happens, and judges it in the end."""

    def __init__(self, world: World) -> None:
        self._world: World = world
        world.on_commit = self._committed
        world.on_srun = self._begun
        world.slurm.on_state = self._changed

    # -- while it happens ------------------------------------------------------------------------------------------

    def _committed(self, truth: Truth, step: int) -> None:
        """An attempt is about to commit."""
        for number in range(truth.number + 1, len(self._world.files.attempts[truth.stage]) + 1):
            later = self._world.truths.get((truth.stage, number))
            if later is not None and later.restored_at is not None:
                self._world.violate(
                    "never two attempts that can commit",
                    f"attempt {truth.number} of {truth.stage} commits step {step} after attempt {number} has restored "
                    f"step {later.restored}",
                )  # fmt: skip

    def _begun(self, truth: Truth) -> None:
        """An attempt is about to work."""
        world, stage = self._world, truth.stage
        if world.cancelled_at is not None:
            world.violate("a cancelled run never restarts", f"attempt {truth.number} of {stage} begins")
        ledger = world.files.now_ledger()
        self._may_begin(ledger, truth)
        self._within_budgets(ledger, stage, truth.number)
        now = ledger.overrides(world.kernel.now)
        if truth.node in now.excluded and len(now.excluded) < len(world.scenario.site.nodes):
            since = max(one.time for one in now.history if one.field == f"exclude.{truth.node}")
            # A job of a later stage that was queued before keeps the nodes it was given.
            if since < truth.job.queued - 5 and not truth.job.changes_refused:
                world.violate("overrides survive", f"attempt {truth.number} of {stage} begins on {truth.node}")

    def _may_begin(self, ledger: Ledger, truth: Truth) -> None:
        """Neither a cancelled job nor one that another has replaced begins an attempt."""
        stage, job = truth.stage, truth.job
        asked = self._world.kernel.now - PROLOGUE_S
        cancelled = any(event.job_id == job.id and event.time < asked for event in ledger.of(Cancelled, stage))
        # Where its present start is being cancelled, the attempt is ended with it.
        if cancelled or (job.cancelled_start is not None and job.cancelled_start < truth.start):
            self._world.violate(
                "a cancelled run never restarts", f"attempt {truth.number} of {stage} begins in cancelled job {job.id}"
            )  # fmt: skip
        submitted = ledger.of(Submitted, stage)
        comment = comments.parse(job.comment)
        known = any(event.job_id == job.id or (comment and event.nonce == comment.nonce) for event in submitted)
        # While somebody queues the stage anew, a job without a submission may be the very one: it cannot be told.
        queueing = any(event.time > asked for event in ledger.of(Intended, stage))
        if known and submitted[-1].job_id != job.id and not queueing:
            self._world.violate(
                "never two jobs for one stage",
                f"attempt {truth.number} of {stage} begins in job {job.id}, in place of which {submitted[-1].job_id} "
                "was queued",
            )  # fmt: skip

    def _within_budgets(self, ledger: Ledger, stage: str, number: int) -> None:
        """`number`: of the attempt that begins; those before it have ended."""
        first = self._first_since_request(ledger, stage)
        causes: dict[int, str] = {}
        for event in ledger.of(Settled, stage):
            causes.setdefault(event.attempt, event.cause)
        counts = Counter(causes[one] for one in range(first, number) if one in causes)
        for cause, count in counts.items():
            budget = policy.KINDS[cast(Cause, cause)].budget
            if budget is not None and count > budget:
                self._world.violate(
                    "no budget is exceeded", f"attempt {number} of {stage} begins after {count} ends by {cause}"
                )  # fmt: skip

    def _first_since_request(self, ledger: Ledger, stage: str, before: float = inf) -> int:
        """The first attempt after the owner last asked for the stage to run (before a moment)."""
        first = 1
        for event in ledger.events:
            if event.time > before:
                break
            by_owner = event.writer.startswith(BY_OWNER)
            if isinstance(event, Submitted) and event.stage == stage and not event.automatic and by_owner:
                first = event.after_attempt + 1
            elif isinstance(event, ResumeRequested):
                first = event.after_attempts.get(stage, 0) + 1
        return first

    def _changed(self, job: Job) -> None:
        """The state of a job has changed."""
        world = self._world
        if job.state not in ("PENDING", "RUNNING") or job.stages == (RECOVERY,):
            return
        if job.state == "PENDING" and job.starts == 0 and world.cancelled_at is not None and not job.late:
            world.violate("a cancelled run never restarts", f"job {job.id} is queued")
        for other in world.slurm.jobs.values():
            if other is job or other.stages == (RECOVERY,) or other.state not in ("PENDING", "RUNNING"):
                continue
            if job.late or other.late:
                continue  # nobody can prevent that; such a job must leave as soon as it starts
            shared = [stage for stage in job.stages if stage in other.stages and not world.files.done(stage)]
            if shared and not (other.completing and not other.back_to_queue):
                world.violate(
                    "never two jobs for one stage", f"{other.id} and {job.id} are queued for {shared[0]}"
                )  # fmt: skip

    # -- in the end ------------------------------------------------------------------------------------------------

    def end(self) -> str:
        """Judge a history in which nothing more will happen; how it ended."""
        self._processes()
        self._causes()
        self._changes()
        self._stops()
        return self._ended()

    def _processes(self) -> None:
        for process in self._world.kernel.processes:
            if process.failure is not None and not isinstance(process.failure, EXPECTED):
                self._world.violate(
                    "no process fails", f"{process.name}: {type(process.failure).__name__}: {process.failure}"
                )  # fmt: skip

    def _causes(self) -> None:
        seen: set[tuple[str, int]] = set()
        ledger = self._world.files.now_ledger()
        for event in ledger.of(Settled):
            truth = self._world.truths.get((event.stage, event.attempt))
            if truth is None or (event.stage, event.attempt) in seen:
                continue
            seen.add((event.stage, event.attempt))
            if event.cause == "cancelled" and ledger.cancelled(event.stage, truth.job.id):
                continue  # the owner said so, though the command may have been killed before it reached Slurm
            if event.cause != "unknown" and event.cause not in truth.causes:
                self._world.violate(
                    "never a wrong cause",
                    f"attempt {event.attempt} of {event.stage}: {event.cause} (by {event.by}), but it was "
                    f"{', '.join(sorted(truth.causes)) or 'nothing'}",
                )  # fmt: skip

    def _changes(self) -> None:
        """Each end changes something once."""
        ledger = self._world.files.now_ledger()
        # Two who decide about the same end at the same time record the same change.
        distinct = {(event.field, str(event.value), event.after) for event in ledger.of(Override)}
        changes = Counter(field.split(".")[0] for field, _, _ in distinct)
        for prefix, cause in CAUSE_OF_CHANGE.items():
            made = changes[prefix.split(".")[0]]
            ends = sum(
                event.cause == cause for stage in STAGES for event in ledger.settled(stage).values()
            )  # fmt: skip
            if made > ends:
                self._world.violate("overrides survive", f"{made} changes of {prefix} after {ends} ends by {cause}")

    def _stops(self) -> None:
        """What ended before the owner asked for more stops nothing."""
        ledger = self._world.files.now_ledger()
        for submitted in ledger.of(Submitted):
            if not submitted.automatic and not submitted.writer.startswith(BY_OWNER):
                self._world.violate(
                    "no budget is exceeded", f"{submitted.writer} records a request for {submitted.stage}"
                )  # fmt: skip
        for event in ledger.of(Decided):
            if event.choice != "stop" or event.cause == "cancelled" or not event.attempt:
                continue
            # Whoever decided had read the ledger before, by a clock that may be another.
            if event.attempt < self._first_since_request(ledger, event.stage, before=event.time - PROLOGUE_S):
                self._world.violate(
                    "a request is honored", f"{event.stage} is stopped for its attempt {event.attempt}: {event.message}"
                )  # fmt: skip

    def _ended(self) -> str:
        world = self._world
        for job in world.slurm.jobs.values():
            if not job.over:
                world.violate("every history ends", f"job {job.id} ({'+'.join(job.stages)}) is {job.shown} forever")
                return "endless"
        action = self.action()
        if isinstance(action, Nothing) and not action.stage:
            return "completed"
        if isinstance(action, Stop) or (isinstance(action, Nothing) and action.over):
            if action.cause == "cancelled":
                if not world.cancel_given:
                    world.violate("never a wrong cause", "the run is cancelled, and nobody has cancelled it")
                return "cancelled"
            if not action.message:
                world.violate("every history ends", "failed without a reason")
            return "failed"
        ledger = world.files.now_ledger()
        if any(decided.choice == "stop" for stage in STAGES for decided in ledger.decisions(stage)):
            return "failed"  # though a process on a lost node has finished its stage since
        if not world.owner_satisfied or world.recovery_hit:
            return "abandoned"
        world.violate("every history ends", f"nobody goes on: {type(action).__name__}: {action.message}")
        return "stranded"

    def action(self) -> Any:
        """What is due in the end, as `make status` would derive it."""
        world = self._world
        ledger = world.files.now_ledger()
        view = self._view(ledger)
        return decide.next_action(decide.with_unknown_ends(ledger, view), view, world.kernel.now)

    def _view(self, ledger: Ledger) -> SchedulerView:
        slurm = self._world.slurm
        jobs = {}
        for job_id in ledger.jobs.values():
            job = slurm.jobs.get(job_id)
            known = job is not None and (slurm.known(job_id) or slurm.site.accounting == "answered")
            jobs[job_id] = SeenJob(job.shown if job is not None and known else "", id=job_id)
        accounting: Any = "disabled" if slurm.site.accounting == "disabled" else "answered"
        return SchedulerView(jobs=jobs, accounting=accounting)


__all__ = ["MOST_STILLBORN", "QueueAnew", "Watch"]
