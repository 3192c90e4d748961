"""What the reducer and the submission code know of a scheduler: what it says of jobs, and what it can be asked to do.
`ftlib/slurm` implements it with Slurm's commands; the simulation with a Slurm in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol


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


@dataclass(frozen=True)
class SchedulerView:
    """What Slurm says at one moment, and where the one who asks stands."""

    jobs: Mapping[str, Job] = field(default_factory=dict)  # job id -> what squeue or accounting says of it
    answered: bool = True  # squeue answered; otherwise nothing is known of any job
    accounting: Accounting = "answered"
    here: str | None = None  # the id of the job that asks (its prologue or epilogue); None on a login node
    may_requeue: bool = True  # the site allows requeueing

    def job(self, job_id: str) -> Job:
        """What Slurm says of a job."""
        return self.jobs.get(job_id, UNKNOWN_JOB)


class Scheduler(Protocol):
    """A scheduler of jobs. Each call may raise `Unavailable` where it does not answer."""

    def queue(self) -> list[Job]:
        """The user's jobs that the controller still knows, with their comments."""

    def look(self, job_ids: Collection[str]) -> SchedulerView:
        """What is known of `job_ids` from the queue and, where it forgot them, from accounting."""

    def cancel(self, job_ids: Iterable[str]) -> None:
        """End jobs; those that are gone already are no error."""

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        """Put a running job back into the queue; whether that was accepted.

        incomplete_only: leave a job alone that was cancelled or has ended.
        """

    def state(self, job_id: str) -> str | None:
        """The controller's word for a job's state now; None where it does not answer or has forgotten the job."""

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        """Change a pending job (`StartTime`, `ExcNodeList`, `MinMemoryNode`); whether that was accepted."""
