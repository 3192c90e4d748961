"""What a run is doing: derived from its outcomes and events first, then from what the scheduler says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftlib import events, outcome
from ftlib.outcome import Outcome, names
from ftlib.rundir import STAGES, RunDir

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


@dataclass
class Journal:
    """What the small files of a run folder say, each read once."""

    log: list[dict[str, Any]]  # events, oldest first
    ends: dict[str, list[Outcome]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    lives: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    jobs: dict[str, str] = field(default_factory=dict)  # stage, or guard -> the job it was last queued under
    nonces: dict[str, str] = field(default_factory=dict)  # stage -> the word by which that job's comment tells it
    home: Path | None = None  # where a resume found it after it had been moved or copied

    def done(self, stage: str) -> bool:
        """Whether some life of the stage ended well."""
        return any(end.code == 0 for end in self.ends[stage])


def journal(run: RunDir) -> Journal:
    """Read a run's events, outcomes and lives."""
    found = Journal(events.read(run.events))
    for end in outcome.read(run.outcomes):
        if end.stage in found.ends:
            found.ends[end.stage].append(end)
    for name in names(run.lives):
        stage = name.rpartition("-")[0]
        if stage in found.lives:
            found.lives[stage] += 1
    for event in found.log:
        if event["event"] == "submitted":
            found.jobs[event["stage"]] = str(event["job_id"])
            # The job that prepares a sibling's dataset has that one's word.
            found.nonces[event["stage"]] = "" if "prepared_by" in event else str(event.get("nonce", ""))
        elif event["event"] == "moved":  # what was queued before was queued for the other place
            found.jobs, found.home = {}, Path(event["to"])
    return found


def elsewhere(run: RunDir, known: Journal, provenance: dict[str, Any]) -> tuple[Place, str]:
    """Whether the run lies where it was made, and a person's words where it does not. A copy has no jobs of its own:
    those in its events are the original's, and `known` forgets them."""
    if known.home is None and provenance["run"] != run.name:
        original = provenance["run"]
        words = f"a copy of run {original} under another name; jobs and checkpoints are that run's"
    else:
        original = known.home or Path(provenance["checkout"]) / "runs" / run.name
        if original == run.path or original.resolve() == run.path.resolve():
            return "here", ""
        if not (original / "spec.json").exists():
            return "moved", f"moved here from {original.parent}, where its queued jobs still look for it"
        words = f"a copy of the run in {original.parent}; the jobs are that run's"
    known.jobs = {}
    return "copy", words


def submission(run: RunDir, stage: str) -> dict[str, Any]:
    """The event of the stage's last submission; empty without one."""
    return next((event for event in reversed(events.read(run.events))
                 if event["event"] == "submitted" and event["stage"] == stage), {})  # fmt: skip


def submissions(run: RunDir) -> dict[str, str]:
    """The job id each stage, and the guard, was last queued under; local runs have process ids."""
    return journal(run).jobs


def stages(known: Journal, scheduler: Mapping[str, tuple[str, ...]] | None, *,
           alive: bool = False) -> dict[str, StageState]:
    """Every stage's state, by what its folder says first.
    scheduler: job id -> (Slurm's state, its reason, its comment, …); None for a run without Slurm, whose foreground
    process is `alive` or not. A job whose comment is another's has come by our job's number, on another cluster."""
    last_said = {str(e.get("stage")): e["event"] for e in known.log if e["event"] in ("submitted", "cancelled")}
    cancelled_jobs = {(e.get("stage"), str(e.get("job_id"))) for e in known.log if e["event"] == "cancelled"}
    found: dict[str, StageState] = {}
    broken = False  # an earlier stage failed or was cancelled
    for stage in STAGES:
        lives, job = known.lives[stage], known.jobs.get(stage)
        last = known.ends[stage][-1] if known.ends[stage] else None
        words = last.words if last else ""
        state: State
        if known.done(stage):
            state = "completed"
        elif scheduler is not None and job:
            slurm, reason, comment = (*scheduler.get(job, ()), "", "", "")[:3]
            if comment and known.nonces[stage] not in comment:
                slurm = ""
            if slurm == "UNKNOWN":  # Slurm does not answer: by what the folder says
                state = "running" if lives and not (last and last.life == lives) else "queued"
            else:
                state = SLURM_STATES.get(slurm, "failed" if slurm or not broken else "cancelled")
            if state == "failed" and (stage, job) in cancelled_jobs:
                # It was ending already, by its time limit or a failure, when its owner cancelled it.
                state = "cancelled"
            if state == "queued":
                words = reason
            elif state == "failed" and not words:
                words = f"Slurm says {slurm}" if slurm else "Slurm does not know its job any more"
        elif last_said.get(stage) == "cancelled" or broken:
            state = "cancelled"
        elif scheduler is None and alive:
            state = "running" if lives and job and not (last and last.life == lives) else "queued"
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


def overall(found: Mapping[str, StageState]) -> State:
    """The run's state from its stages'."""
    states = [stage.state for stage in found.values()]
    for state in ("failed", "cancelled", "running"):
        if state in states:
            return state
    return "completed" if all(state == "completed" for state in states) else "queued"
