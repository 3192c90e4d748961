"""One run's stages as a chain of Slurm jobs, through submitit: afterok, intent before sbatch."""

from __future__ import annotations

import math
import os
import shlex
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from ftlib.errors import FtError
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import attempts, comments
from ftlib.runs.comments import AND, GUARD
from ftlib.runs.events import Cancelled, CheckpointSaved, Intended, Submitted
from ftlib.runs.ledger import IMAGE, RECOVERY
from ftlib.slurm import batch, client, container, retry

STAGE_MODULE = 'jobs.stage "$FT_RUN" "$FT_STAGE"'


class ModuleExecutor(SlurmExecutor):
    """submitit's executor for a job that runs `python -m module`: its run folder holds all that a pickle would."""

    def __init__(self, folder: Path, *, python: str, module: str, srun_options: str = "") -> None:
        """srun_options: shell words before the command, for what the shell fills in."""
        super().__init__(folder, python=python)
        self.module, self.srun_options = module, srun_options

    @classmethod
    def affinity(cls) -> int:
        return 2  # a dry run prints its script where there is no srun, too

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.srun_options}{self.python} -u -m {self.module}"

    def script(self) -> str:
        """The sbatch script, to the letter."""
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")

    def queue(self, what: str, *, patience_s: float = retry.SUBMIT_S, before: Collection[str] = ()) -> str:
        """Call sbatch, again for `patience_s` where the controller is busy; returns the job's id.

        before: ids of other jobs that have the same comment.
        """
        self.folder.mkdir(parents=True, exist_ok=True)

        def sbatch() -> str:
            return str(self._submit_command(self._submitit_command_str).job_id)

        return retry.submit(sbatch, what, self.parameters["comment"], patience_s=patience_s, before=before)


def executor(
    profile: ClusterProfile, plan: RunPlan, stages: Sequence[str], provenance: dict[str, Any], *,
    run: Path, comment: str, after: str | None,
) -> ModuleExecutor:  # fmt: skip
    """submitit's executor of the job that runs `stages` of the run folder `run`, whose `provenance` that is.

    after: the id of the job that must complete before it.
    """
    first, request = stages[0], batch.request(profile, plan, stages)
    variables = batch.environment(profile, plan, first, run=run, cache=Path(provenance["cache"]))
    job = ModuleExecutor(
        run / "slurm" / first, python=container.worker(profile, plan, first, provenance), module=STAGE_MODULE,
        srun_options=batch.output(stages),
    )  # fmt: skip
    parameters = batch.parameters(
        profile, request, name=f"{run.name}.{AND.join(stages)}", comment=comment, shared=len(stages) > 1,
        setup=batch.setup(profile, variables, run, stages, request.time_min),
        dependency=f"afterok:{after}" if after else None,
    )  # fmt: skip
    job.update_parameters(**parameters)
    return job


def scripts(
    profile: ClusterProfile, plan: RunPlan, *, run: Path, provenance: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(STAGE.sbatch, script) as they would be queued; job ids that do not exist yet are named by their stages."""
    after = None
    for stages in plan.jobs:
        name = AND.join(stages)
        comment = comments.write(run.name, stages, "<nonce>")
        made = executor(profile, plan, stages, provenance, run=run, comment=comment, after=after)
        yield f"{name}.sbatch", made.script()
        after = f"<job id of {name}>"


def queue(run: RunDir, profile: ClusterProfile, active: dict[str, str], *, by_guard: bool = False) -> dict[str, str]:
    """Queue the run's stages that are neither completed nor among the `active` (stage -> job id), and a guard for all.

    Returns the new jobs. Must be called under `run.claim()`. When sbatch refuses a stage, those queued before it stay
    and wait for the rest.
    """
    plan = _warned_in_time(run, RunPlan.model_validate(run.plan()))
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    exclude = ",".join(filter(None, [profile.exclude, *sorted(run.ledger().overrides(time.time()).excluded)]))
    profile = profile.model_copy(update={"exclude": exclude or None})
    queued: dict[str, str] = {}
    try:
        before = queue_image(run, profile, by_guard=by_guard)
        for stages in plan.jobs:
            missing = [stage for stage in stages if not run.stage_done(stage)]
            before = next((active[stage] for stage in reversed(missing) if stage in active), before)
            if new := [stage for stage in missing if stage not in active]:
                before = queue_job(run, profile, plan, new, before, by_guard=by_guard)
                queued |= dict.fromkeys(new, before)
        if queued or not _guarded(run):
            watched = [*(job for stage, job in active.items() if stage in STAGES), *queued.values()]
            _queue_guard(run, profile, plan, list(dict.fromkeys(watched)), patience_s=_patience_s(by_guard=by_guard))
    except client.Refused as error:
        words = f"Queued before it: {', '.join(queued) or 'nothing'}; make resume RUN={run.name} queues what is missing"
        raise FtError(f"{error}. {words}") from None
    return queued


def queue_job(
    run: RunDir, profile: ClusterProfile, plan: RunPlan, stages: Sequence[str], after: str | None, *,
    by_guard: bool = False,
) -> str:  # fmt: skip
    """Queue the job that runs `stages` one after the other, to follow the job `after`; returns its id."""
    nonce, name = _intend(run, stages), AND.join(stages)
    comment = comments.write(run.name, stages, nonce)
    made = executor(profile, plan, stages, run.provenance(), run=run.path, comment=comment, after=after)
    for stage in stages:  # Slurm makes no folders for logs
        (run.slurm / stage).mkdir(parents=True, exist_ok=True)
    job = made.queue(f"{name} of {run.name}", patience_s=_patience_s(by_guard=by_guard))
    return _submitted(run, stages, job, nonce, by_guard=by_guard)


def _patience_s(*, by_guard: bool) -> float:
    return retry.RECOVERY_S if by_guard else retry.SUBMIT_S


def _warned_in_time(run: RunDir, plan: RunPlan) -> RunPlan:
    """The plan, with a warning before the time limit that the slowest save of earlier lives would need."""
    saves = [event.seconds for event in run.ledger().of(CheckpointSaved)]
    train = plan.stages["train"]
    longer = train.model_copy(update={"warning_s": max(train.warning_s, 60 + math.ceil(1.5 * max(saves, default=0)))})
    return plan.model_copy(update={"stages": {**plan.stages, "train": longer}})


def queue_image(run: RunDir, profile: ClusterProfile, *, by_guard: bool) -> str | None:
    """The job that builds the run's image, in front of the chain; None where it is there, or none is used."""
    from jobs import image

    patience_s = _patience_s(by_guard=by_guard)
    job = image.job_before(profile, Path(run.provenance()["checkout"]), patience_s=patience_s)
    return _submitted(run, [IMAGE], job, "", by_guard=by_guard) if job else None


def _guarded(run: RunDir) -> bool:
    """Whether the newest jobs have a guard: a submit that was killed may have queued the last stage and no guard."""
    stages = [event.stage for event in run.ledger().of(Submitted)]
    return stages[-1:] == [RECOVERY]


def _queue_guard(
    run: RunDir, profile: ClusterProfile, plan: RunPlan, watched: list[str], *, patience_s: float
) -> None:
    nonce = _intend(run, [RECOVERY])
    variables = batch.environment(profile, plan, STAGES[0], run=run.path, cache=Path(run.provenance()["cache"]))
    made = ModuleExecutor(
        run.slurm / GUARD, python=shlex.quote(variables["FT_PYTHON"]), module=f"jobs.guard {shlex.quote(str(run.path))}"
    )
    words = batch.small_parameters(
        profile, name=f"{run.name}.{GUARD}", setup=batch.enter(profile, variables, run.code),
        comment=comments.write(run.name, [RECOVERY], nonce),
        # Any of them; when all complete, the dependency can never be met and Slurm removes the guard.
        dependency="?".join(f"afternotok:{job}" for job in watched),
    )  # fmt: skip
    made.update_parameters(**words)
    job = made.queue(f"{GUARD} of {run.name}", patience_s=patience_s)
    _submitted(run, [RECOVERY], job, nonce, by_guard=False)


def _intend(run: RunDir, stages: Sequence[str]) -> str:
    """Write down that a job is about to be queued; returns the word by which its comment tells it."""
    nonce = uuid.uuid4().hex[:12]
    run.record(*(Intended(stage=stage, nonce=nonce) for stage in stages))
    return nonce


def _submitted(run: RunDir, stages: Sequence[str], job: str, nonce: str, *, by_guard: bool) -> str:
    """Write down that the job runs `stages`; returns it."""
    known = attempts.read(run.lives)
    submitted = (
        Submitted(
            stage=stage, job_id=job, nonce=nonce, after_attempt=len(known.get(stage, ())), automatic=by_guard,
        )
        for stage in stages
    )  # fmt: skip
    run.record(*submitted)
    return job


def adopt(run: RunDir) -> list[str]:
    """Take in jobs that were queued by a submit which was killed before it could write down their ids.

    The intent was written before sbatch was called, and the job carries its nonce in its comment. Returns the stages.
    Must be called under `run.claim()`.
    """
    known = run.ledger()
    answered = {event.nonce for event in known.of(Submitted)}
    open_intents = {event.nonce for event in known.of(Intended)} - answered
    adopted: list[str] = []
    for job in client.jobs() if open_intents else ():
        comment = comments.parse(job.comment)
        if comment and comment.run == run.name and comment.nonce in open_intents:
            _submitted(run, comment.stages, job.id, comment.nonce, by_guard=False)
            adopted += comment.stages
    return adopted


def cancel(run: RunDir, job_ids: dict[str, str]) -> None:
    """Cancel the stages' jobs, the last first, so that none starts because another ended."""
    prepare = run.ledger().submissions.get("prepare")
    if prepare and prepare.prepared_by is not None:  # other points of its sweep wait for that job, too
        job_ids = {stage: job for stage, job in job_ids.items() if stage != "prepare"}
    for stage in reversed(list(job_ids)):
        run.record(Cancelled(stage=stage, job_id=job_ids[stage], user=os.environ.get("USER")))
    client.cancel(dict.fromkeys(reversed(list(job_ids.values()))))  # a job of two stages once
