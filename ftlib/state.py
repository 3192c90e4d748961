"""What a run is doing: derived from its outcomes and events first, then from what the scheduler says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ftlib import events, outcome
from ftlib.rundir import STAGES, RunDir

State = Literal["queued", "running", "completed", "failed", "cancelled"]

# Slurm's state names (squeue and sacct), as a run's owner thinks of them.
SLURM_STATES: dict[str, State] = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "RESV_DEL_HOLD": "queued",
    "SPECIAL_EXIT": "queued",
    "PREEMPTED": "queued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "running",
    "SUSPENDED": "running",
    "RESIZING": "running",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}


@dataclass(frozen=True)
class StageState:
    """One stage, now."""

    state: State
    job_id: str | None  # the scheduler's, or the local process's
    lives: int
    words: str  # how its last life ended, or why it waits


def submission(run: RunDir, stage: str) -> dict[str, Any]:
    """The event of the stage's last submission; empty without one."""
    return next((event for event in reversed(events.read(run.events))
                 if event["event"] == "submitted" and event["stage"] == stage), {})  # fmt: skip


def submissions(run: RunDir) -> dict[str, str]:
    """The job id each stage, and the guard, was last queued under; local runs have process ids."""
    return {event["stage"]: str(event["job_id"]) for event in events.read(run.events) if event["event"] == "submitted"}


def stages(run: RunDir, scheduler: dict[str, tuple[str, str]] | None, *, alive: bool = False) -> dict[str, StageState]:
    """Every stage's state.

    scheduler: job id -> (Slurm's state, its reason); None for a run without Slurm, whose foreground process is `alive`
    or not.
    """
    log = events.read(run.events)
    jobs: dict[str, str] = {}
    cancelled: set[str] = set()
    for event in log:
        stage = str(event.get("stage"))
        if event["event"] == "submitted":
            jobs[stage] = str(event["job_id"])
            cancelled.discard(stage)
        elif event["event"] == "cancelled":
            cancelled.add(stage)
    found: dict[str, StageState] = {}
    broken = False  # an earlier stage failed or was cancelled
    for stage in STAGES:
        ends = outcome.read(run.outcomes, stage)
        lives = len(list(run.lives.glob(f"{stage}-*")))
        last = ends[-1] if ends else None
        words = last.words if last else ""
        state: State
        if any(end.code == 0 for end in ends):
            state = "completed"
        elif scheduler is not None and stage in jobs:
            slurm, reason = scheduler.get(jobs[stage], ("", ""))
            state = SLURM_STATES.get(slurm, "failed" if slurm else "cancelled" if broken else "failed")
            if state == "queued":
                words = reason
            elif state == "failed" and not words:
                words = f"Slurm says {slurm}" if slurm else "Slurm does not know its job any more"
        elif stage in cancelled or broken:
            state = "cancelled"
        elif scheduler is None and alive:
            state = "running" if lives and stage in jobs and not (last and last.life == lives) else "queued"
        elif last and last.code != 75:
            state = "failed"
        else:
            # Nothing works on it: a foreground run that was stopped, or a chain queued in part.
            state = "cancelled"
        broken = broken or state in ("failed", "cancelled")
        found[stage] = StageState(state, jobs.get(stage), lives, words)
    return found


def overall(found: dict[str, StageState]) -> State:
    """The run's state from its stages'."""
    states = [stage.state for stage in found.values()]
    for state in ("failed", "cancelled", "running"):
        if state in states:
            return state
    return "completed" if all(state == "completed" for state in states) else "queued"


def as_json(run: RunDir, found: dict[str, StageState]) -> dict[str, Any]:
    """For programs: {"run", "state", "stages": {name: {"state", "job_id", "lives", "words"}}}."""
    return {
        "run": run.name,
        "state": overall(found),
        "stages": {
            name: {"state": s.state, "job_id": s.job_id, "lives": s.lives, "words": s.words}
            for name, s in found.items()
        },
    }
