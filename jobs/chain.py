"""One run's stages as a chain of Slurm jobs, through submitit: afterok, intent before sbatch."""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path

from submitit.slurm.slurm import SlurmExecutor

from ftlib import events, modelfiles
from ftlib.errors import FtError
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import batch, client
from jobs import stage as stage_module


class StageExecutor(SlurmExecutor):
    """submitit's executor for one stage; it can print its script where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The sbatch script, to the letter."""
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")


def executor(
    profile: ClusterProfile, plan: RunPlan, stage: str, *, run: Path, cache: Path, comment: str, after: str | None
) -> StageExecutor:
    """The submitit executor of a stage of the run folder `run`."""
    variables = batch.environment(profile, plan, stage, run=run, cache=cache, hf=modelfiles.hf_home(cache))
    made = StageExecutor(run / "slurm" / stage, python=shlex.quote(profile.python) if profile.python else None)
    made.update_parameters(
        **batch.parameters(profile, plan, stage, run=run, environment=variables, comment=comment, after=after)
    )
    return made


def scripts(profile: ClusterProfile, plan: RunPlan, *, run: Path, cache: Path) -> Iterator[tuple[str, str]]:
    """(stage, sbatch script) as they would be queued; job ids that do not exist yet are named by their stage."""
    before: str | None = None
    for stage in STAGES:
        comment = f"ftlib {run.name} {stage} <nonce>"
        after = f"<job id of {before}>" if before else None
        made = executor(profile, plan, stage, run=run, cache=cache, comment=comment, after=after)
        yield stage, made.script()
        before = stage


def queue(run: RunDir, profile: ClusterProfile, active: dict[str, str]) -> dict[str, str]:
    """Queue the run's stages that are neither completed nor among the `active` (stage -> job id); returns the new ones.

    Must be called under `run.claim()`. When sbatch refuses a stage, those queued before it stay and wait for the rest.
    """
    plan, cache = RunPlan.model_validate(run.plan()), Path(run.provenance()["cache"])
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    writer = events.submit_writer()
    queued: dict[str, str] = {}
    before: str | None = None
    for stage in STAGES:
        if run.stage_done(stage):
            continue
        if stage in active:
            before = active[stage]
            continue
        nonce = uuid.uuid4().hex[:12]
        comment = f"ftlib {run.name} {stage} {nonce}"
        made = executor(profile, plan, stage, run=run.path, cache=cache, comment=comment, after=before)
        events.append(run.events, writer, "intended", stage=stage, nonce=nonce)
        try:
            before = queued[stage] = made.submit(stage_module.run, str(run.path), stage).job_id
        except Exception as error:  # submitit's errors hold sbatch's own words
            raise FtError(
                f"sbatch refused {stage} of {run.name}: {str(error).strip().splitlines()[-1]}. "
                f"Queued before it: {', '.join(queued) or 'nothing'}; make resume RUN={run.name} queues what is missing"
            ) from None
        events.append(run.events, writer, "submitted", stage=stage, job_id=before, nonce=nonce)
    return queued


def scheduler_view(job_ids: list[str]) -> dict[str, tuple[str, str]]:
    """Job id -> (state, reason): from the queue in one call, and from accounting for those the queue has forgotten."""
    known = {job.id: (job.state, job.reason) for job in client.jobs()}
    missing = [job for job in job_ids if job not in known]
    if missing:
        known.update({job.id: (job.state, job.reason) for job in client.accounted(missing)})
    return known


def cancel(run: RunDir, job_ids: dict[str, str]) -> None:
    """Cancel the stages' jobs, the last first, so that none starts because another ended."""
    writer = events.submit_writer()
    for stage in reversed(list(job_ids)):
        events.append(run.events, writer, "cancelled", stage=stage, job_id=job_ids[stage], user=os.environ.get("USER"))
    client.cancel(reversed(list(job_ids.values())))
