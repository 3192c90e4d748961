"""What a run is doing: derived from its outcomes and events first, then from what the scheduler says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlib.rundir import STAGES, RunDir
from ftlib.runs import comments
from ftlib.runs.events import Cancelled, Submitted
from ftlib.runs.ledger import Ledger
from ftlib.runs.outcome import Outcome

State = Literal["queued", "running", "completed", "failed", "cancelled"]
ACTIVE = ("queued", "running")
Place = Literal["here", "moved", "copy"]  # is a run where it was made?

# Slurm's state names (squeue and sacct), as a run's owner thinks of them.
SLURM_STATES: dict[str, State] = {
    **dict.fromkeys(
        ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT",
         "PREEMPTED"), "queued"),
    **dict.fromkeys(
        ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"), "running"),
    **dict.fromkeys(("CANCELLED", "REVOKED"), "cancelled")}  # fmt: skip


@dataclass(frozen=True)
class StageState:
    """One stage, now."""

    state: State
    job_id: str | None  # the scheduler's, or the local process's
    lives: int
    words: str  # how its last life ended, or Slurm's reason why it waits


def elsewhere(run: RunDir, known: Ledger, provenance: dict[str, Any]) -> tuple[Place, str]:
    """Whether the run lies where it was made, and a person's words where it does not. A copy has no jobs of its own:
    those in its events are the original's."""
    if known.home is None and provenance["run"] != run.name:
        original = provenance["run"]
        words = f"a copy of run {original} under another name; jobs and checkpoints are that run's"
    else:
        home = str(known.home or f"{provenance['checkout']}/runs/{run.name}")
        if home == str(run.path):
            return "here", ""
        original = Path(home)
        if original == run.path or original.resolve() == run.path.resolve():
            return "here", ""
        if not (original / "spec.json").exists():
            return "moved", f"moved here from {original.parent}, where its queued jobs still look for it"
        words = f"a copy of the run in {original.parent}; the jobs are that run's"
    return "copy", words


def stages(known: Ledger, scheduler: Mapping[str, tuple[str, ...]] | None, *,
           alive: bool = False) -> dict[str, StageState]:
    """Every stage's state, by what its folder says first.
    scheduler: job id -> (Slurm's state, its reason, its comment, …); None for a run without Slurm, whose foreground
    process is `alive` or not. A job whose comment is another's has come by our job's number, on another cluster."""
    requests = (event for event in known.events if isinstance(event, (Submitted, Cancelled)))
    last_request = {event.stage: event for event in requests}
    cancelled_jobs = {(event.stage, event.job_id) for event in known.of(Cancelled)}
    jobs = known.jobs
    found: dict[str, StageState] = {}
    broken = False  # an earlier stage failed or was cancelled
    for stage in STAGES:
        lives, job = known.attempt_count(stage), jobs.get(stage)
        ends = known.outcomes.get(stage)
        last = ends[-1] if ends else None
        words = last.message if last else ""
        state: State
        if known.done(stage):
            state = "completed"
        elif scheduler is not None and job:
            slurm, reason, comment = (*scheduler.get(job, ()), "", "", "")[:3]
            if comment and not _is_ours(comment, known.submissions[stage]):
                slurm = ""
            if slurm == "UNKNOWN":  # Slurm does not answer: by what the folder says
                state = "running" if lives and not _ended(last, lives) else "queued"
            else:
                state = SLURM_STATES.get(slurm, "failed" if slurm or not broken else "cancelled")
            if state == "failed" and (stage, job) in cancelled_jobs:
                # It was ending already, by its time limit or a failure, when its owner cancelled it.
                state = "cancelled"
            if state == "queued":
                words = reason
            elif state == "failed" and not words:
                words = f"Slurm says {slurm}" if slurm else "Slurm does not know its job any more"
        elif isinstance(last_request.get(stage), Cancelled) or broken:
            state = "cancelled"
        elif scheduler is None and alive:
            state = "running" if lives and job and not _ended(last, lives) else "queued"
        else:
            # Without a failure nothing works on it: a foreground run that was stopped, or a chain queued in part.
            state = "failed" if last and last.code != 75 else "cancelled"
        first = next((name for name in found if found[name].state != "completed" and found[name].job_id == job), None)
        if job and scheduler is not None and first and state != "completed":
            # It shares the job of a stage that is not done: its turn has not come.
            state = "queued" if found[first].state in ACTIVE else "cancelled"
            words = found[first].words if found[first].state == "queued" else f"in the same job, after {first}"
        broken = broken or state in ("failed", "cancelled")
        found[stage] = StageState(state, job, lives, words)
    return found


def _is_ours(comment: str, submission: Submitted) -> bool:
    """Whether a job's comment is that of the job that was queued."""
    if not submission.nonce or submission.prepared_by is not None:  # it is another run's job
        return True
    return comments.ends_with(comment, submission.nonce)


def _ended(last: Outcome | None, attempts: int) -> bool:
    """Whether the newest attempt is the one with the last outcome."""
    return last is not None and last.attempt == attempts


def overall(found: Mapping[str, StageState]) -> State:
    """The run's state from its stages'."""
    states = [stage.state for stage in found.values()]
    for state in ("failed", "cancelled", "running"):
        if state in states:
            return state
    return "completed" if all(state == "completed" for state in states) else "queued"
