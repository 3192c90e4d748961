"""One run's stages as a chain of Slurm jobs, through submitit: afterok, intent before sbatch."""

from __future__ import annotations

import math
import os
import shlex
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from ftlib import events, modelfiles, state
from ftlib.errors import FtError
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import batch, client, container, settle
from ftlib.slurm import queue as slurm_queue
from jobs import guard
from jobs import stage as stage_module

GUARD, IMAGE = "guard", "image"


class StageExecutor(SlurmExecutor):
    """submitit's executor for one stage; it can print its script where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The sbatch script, to the letter."""
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")


class ModuleExecutor(StageExecutor):
    """submitit's executor for a job that runs `python -m module` and needs no pickle."""

    module: str

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m {self.module}"

    def queue(self, what: str) -> str:
        """Call sbatch; returns the job's id. FtError holds sbatch's words."""
        try:
            return str(self._submit_command(self._submitit_command_str).job_id)
        except Exception as error:
            raise FtError(f"sbatch refused {what}: {str(error).strip().splitlines()[-1]}") from None


def executor(
    profile: ClusterProfile,
    plan: RunPlan,
    stage: str,
    *,
    run: Path,
    cache: Path,
    comment: str,
    after: str | None,
    provenance: dict[str, Any] | None = None,
) -> StageExecutor:
    """The submitit executor of a stage of the run folder `run`; without `provenance` that folder tells it."""
    python = profile.python or sys.executable
    worker = container.worker(profile, plan, stage, RunDir(run).provenance() if provenance is None else provenance)
    variables = batch.environment(
        profile, plan, stage, run=run, cache=cache, hf=modelfiles.hf_home(cache), python=python
    )
    made = StageExecutor(run / "slurm" / stage, python=worker)
    words = batch.parameters(
        profile,
        plan.stages[stage],
        name=f"{run.name}.{stage}",
        setup=batch.setup(profile, variables, run),
        comment=comment,
        dependency=f"afterok:{after}" if after else None,
    )
    made.update_parameters(**words)
    return made


def scripts(
    profile: ClusterProfile, plan: RunPlan, *, run: Path, provenance: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(stage, sbatch script) as they would be queued; job ids that do not exist yet are named by their stage."""
    cache, before = Path(provenance["cache"]), None
    for stage in STAGES:
        comment = f"ftlib {run.name} {stage} <nonce>"
        after = f"<job id of {before}>" if before else None
        made = executor(profile, plan, stage, run=run, cache=cache, comment=comment, after=after, provenance=provenance)
        yield stage, made.script()
        before = stage


def queue(run: RunDir, profile: ClusterProfile, active: dict[str, str], *, by_guard: bool = False) -> dict[str, str]:
    """Queue the run's stages that are neither completed nor among the `active` (stage -> job id), and a guard for all.

    Returns the new jobs. Must be called under `run.claim()`. When sbatch refuses a stage, those queued before it stay
    and wait for the rest.
    """
    plan, cache = _warned_in_time(run, RunPlan.model_validate(run.plan())), Path(run.provenance()["cache"])
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    exclude = ",".join(filter(None, [profile.exclude, *settle.excluded_nodes(run.path)]))
    profile = profile.model_copy(update={"exclude": exclude or None})
    queued: dict[str, str] = {}
    before = queue_image(run, profile, by_guard=by_guard)
    for stage in STAGES:
        if run.stage_done(stage):
            continue
        if stage in active:
            before = active[stage]
            continue
        nonce = _intend(run, stage)
        comment = f"ftlib {run.name} {stage} {nonce}"
        made = executor(profile, plan, stage, run=run.path, cache=cache, comment=comment, after=before)
        try:
            before = queued[stage] = made.submit(stage_module.run, str(run.path), stage).job_id
        except Exception as error:  # submitit's errors hold sbatch's own words
            raise _refused(run, stage, queued, error) from None
        _submitted(run, stage, before, nonce, by_guard=by_guard)
    if queued:
        watched = [*(job for stage, job in active.items() if stage in STAGES), *queued.values()]
        _queue_guard(run, profile, plan, cache, watched)
    return queued


def _warned_in_time(run: RunDir, plan: RunPlan) -> RunPlan:
    """The plan, with a warning before the time limit that the slowest save of earlier lives would need."""
    saves = [event["seconds"] for event in events.read(run.events) if event["event"] == "checkpoint"]
    train = plan.stages["train"]
    longer = train.model_copy(update={"warning_s": max(train.warning_s, 60 + math.ceil(1.5 * max(saves, default=0)))})
    return plan.model_copy(update={"stages": {**plan.stages, "train": longer}})


def queue_image(run: RunDir, profile: ClusterProfile, *, by_guard: bool) -> str | None:
    """The job that builds the run's image, in front of the chain; None where it is there, or none is used."""
    from jobs import image

    try:
        job = image.job_before(profile, Path(run.provenance()["checkout"]))
    except Exception as error:
        raise _refused(run, IMAGE, {}, error) from None
    if job:
        _submitted(run, IMAGE, job, "", by_guard=by_guard)
    return job


def _queue_guard(run: RunDir, profile: ClusterProfile, plan: RunPlan, cache: Path, watched: list[str]) -> None:
    nonce = _intend(run, GUARD)
    python = profile.python or sys.executable
    variables = batch.environment(
        profile, plan, STAGES[0], run=run.path, cache=cache, hf=modelfiles.hf_home(cache), python=python
    )
    made = StageExecutor(run.slurm / GUARD, python=shlex.quote(python))
    comment = f"ftlib {run.name} {GUARD} {nonce}"
    words = batch.small_parameters(
        profile,
        name=f"{run.name}.{GUARD}",
        setup=batch.enter(profile, variables, run.code),
        comment=comment,
        # Any of them; when all complete, the dependency can never be met and Slurm removes the guard.
        dependency="?".join(f"afternotok:{job}" for job in watched),
    )
    made.update_parameters(**words)
    try:
        job = made.submit(guard.run, str(run.path)).job_id
    except Exception as error:
        raise _refused(run, GUARD, {}, error) from None
    _submitted(run, GUARD, job, nonce, by_guard=False)


def _intend(run: RunDir, stage: str) -> str:
    """Write down that a job is about to be queued; returns the word by which its comment tells it."""
    nonce = uuid.uuid4().hex[:12]
    events.append(run.events, events.submit_writer(), "intended", stage=stage, nonce=nonce)
    return nonce


def _submitted(run: RunDir, stage: str, job: str, nonce: str, *, by_guard: bool) -> None:
    lives = len(list(run.lives.glob(f"{stage}-*")))
    events.append(
        run.events, events.submit_writer(), "submitted", stage=stage, job_id=job, nonce=nonce, after_life=lives,
        automatic=by_guard,
    )  # fmt: skip


def _refused(run: RunDir, stage: str, queued: dict[str, str], error: Exception) -> FtError:
    return FtError(
        f"sbatch refused {stage} of {run.name}: {str(error).strip().splitlines()[-1]}. "
        f"Queued before it: {', '.join(queued) or 'nothing'}; make resume RUN={run.name} queues what is missing"
    )


def adopt(run: RunDir) -> list[str]:
    """Take in jobs that were queued by a submit which was killed before it could write down their ids.

    The intent was written before sbatch was called, and the job carries its nonce in its comment. Returns the stages.
    Must be called under `run.claim()`.
    """
    log = events.read(run.events)
    answered = {event["nonce"] for event in log if event["event"] == "submitted" and "nonce" in event}
    open_intents = {e["nonce"]: e["stage"] for e in log if e["event"] == "intended" and e["nonce"] not in answered}
    if not open_intents:
        return []
    found = []
    for job in client.jobs():
        words = job.comment.split(" ")
        if len(words) == 4 and words[:2] == ["ftlib", run.name] and words[3] in open_intents:
            _place_pickle(run, words[2], job.id)
            _submitted(run, words[2], job.id, words[3], by_guard=False)
            found.append(words[2])
    return found


def _place_pickle(run: RunDir, stage: str, job: str) -> None:
    """Give the adopted job its task: submitit renames the pickle only after sbatch has answered, and never did."""
    folder = run.slurm / stage
    target = folder / f"{job}_submitted.pkl"
    left = sorted(folder.glob("*.pkl"), key=lambda path: path.stat().st_mtime, reverse=True)
    unnamed = [path for path in left if not path.name.endswith(("_submitted.pkl", "_result.pkl"))]
    if not target.exists() and unnamed:
        os.replace(unnamed[0], target)


def scheduler_view(job_ids: list[str]) -> dict[str, tuple[str, str]]:
    """Job id -> (state, reason) of those that Slurm knows."""
    return {number: (job.state, job.reason) for number, job in slurm_queue.ask(job_ids).jobs.items() if job.state}


def cancel(run: RunDir, job_ids: dict[str, str]) -> None:
    """Cancel the stages' jobs, the last first, so that none starts because another ended."""
    if "prepared_by" in state.submission(run, "prepare"):  # other points of its sweep wait for that job, too
        job_ids = {stage: job for stage, job in job_ids.items() if stage != "prepare"}
    writer = events.submit_writer()
    for stage in reversed(list(job_ids)):
        events.append(run.events, writer, "cancelled", stage=stage, job_id=job_ids[stage], user=os.environ.get("USER"))
    client.cancel(reversed(list(job_ids.values())))
