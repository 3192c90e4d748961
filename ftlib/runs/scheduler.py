"""What the reducer and the submission code know of a scheduler: what it says of jobs, and what it can be asked to do.
`ftlib/slurm` implements it with Slurm's commands; the simulation with a Slurm in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from ftlib.runs.events import Submitted


class Job(NamedTuple):
    """One job, or one task of an array, as the scheduler sees it."""

    state: str  # Slurm's long state name, such as PENDING; empty where Slurm does not know the job
    reason: str = ""  # why it is pending, in Slurm's words
    comment: str = ""
    start: str = ""  # when it began or is expected to begin, in seconds since 1970; N/A where Slurm cannot tell
    id: str = ""  # of an array's task: ARRAY_INDEX


UNKNOWN_JOB = Job("")

# What accounting (sacct) said: "disabled" where the site has none, "failed" where it did not answer.
Accounting = Literal["answered", "disabled", "failed"]


# Slurm's states of a job that has not ended; a job in any other state cannot start again by itself.
WAITING = (
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT",
)  # fmt: skip
AT_WORK = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING")
CANCELLED = ("CANCELLED", "REVOKED")
# Ends after which Slurm cancels what depends on the job with afterok.
FAILED = ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")


@dataclass(frozen=True)
class Here:
    """Where the one who asks stands, if inside a job: in its prologue (the attempt is about to begin, and its number
    not taken yet) or in its epilogue (it has ended)."""

    job_id: str
    stage: str
    attempt: int
    ended: bool
    may_requeue: bool = True  # the site allows requeueing
    mem_mib: int | None = None  # memory that its job has on each node, in MiB; None where that is not known


@dataclass(frozen=True)
class SchedulerView:
    """What Slurm says at one moment, and where the one who asks stands."""

    jobs: Mapping[str, Job] = field(default_factory=dict)  # job id -> what squeue or accounting says of it
    answered: bool = True  # squeue answered; otherwise nothing is known of any job
    accounting: Accounting = "answered"
    here: Here | None = None  # None on a login node, and in the recovery job

    def job(self, job_id: str) -> Job:
        """What Slurm says of a job."""
        return self.jobs.get(job_id, UNKNOWN_JOB)

    def active(self, job_id: str) -> bool:
        """Whether the job is queued or running."""
        return self.job(job_id).state in (*WAITING, *AT_WORK)

    @classmethod
    def inside(cls, here: Here, state: str | None) -> SchedulerView:
        """What is known inside a job: the controller's word for its state, None where it does not answer."""
        return cls(jobs={here.job_id: Job(state or "")}, answered=state is not None, here=here)

    def knows(self, job_id: str) -> bool:
        """Whether it is known that the job is active or not: the controller lists every job that is not over."""
        return self.answered or self.job(job_id).state not in ("", "UNKNOWN")


@dataclass(frozen=True)
class Request:
    """A job to be queued for a run."""

    stages: tuple[str, ...]  # that it runs one after the other; ("recovery",) is the recovery job
    nonce: str  # of its comment
    after_ok: str | None = None  # the job that must complete before it
    after_not_ok: tuple[str, ...] = ()  # any of these must fail before it (the recovery job's)


class Controller(Protocol):
    """Slurm's controller, as a batch script sees it. Nothing here raises where it does not answer."""

    def state(self, job_id: str) -> str | None:
        """The controller's word for a job's state now; None where it does not answer or has forgotten the job."""

    def restarts(self, job_id: str) -> int | None:
        """How often the job has gone back to the queue; None where the controller does not answer."""

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        """Put a running job back into the queue; whether that was accepted.

        incomplete_only: leave a job alone that was cancelled or has ended.
        """

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        """Change a pending job (`StartTime`, `ExcNodeList`, `MinMemoryNode`); whether that was accepted."""


class Scheduler(Protocol):
    """A scheduler, as a run on a login node uses it. Each call may raise `Unavailable` where it does not answer."""

    def submit(self, request: Request) -> Submitted:
        """Queue a job; the event to be recorded of its first stage. Raises `FtError` where it is refused."""

    def queue(self) -> list[Job]:
        """The user's jobs that the controller still knows, with their comments."""

    def look(self, job_ids: Collection[str]) -> SchedulerView:
        """What is known of `job_ids` from the queue and, where it forgot them, from accounting."""

    def cancel(self, job_ids: Iterable[str]) -> None:
        """End jobs; those that are gone already are no error."""
