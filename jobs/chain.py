"""One run's jobs as Slurm gets them, through submitit. What is queued and when: ftlib/runs/chain.py."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from ftlib.errors import Unavailable
from ftlib.plan.plan import RunPlan, StagePlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import comments
from ftlib.runs.comments import AND, GUARD
from ftlib.runs.events import CheckpointSaved, Submitted
from ftlib.runs.ledger import IMAGE, RECOVERY
from ftlib.runs.scheduler import Job, Request, SchedulerView
from ftlib.slurm import batch, client, container, retry
from ftlib.slurm import queue as slurm_queue

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


class SlurmSite:
    """`ftlib.runs.scheduler.Scheduler` for one run: its jobs, as its plan and the site's profile ask for them."""

    def __init__(
        self, run: RunDir, profile: ClusterProfile, plan: RunPlan, *, patience_s: float = retry.SUBMIT_S,
        patient: bool = False,
    ) -> None:  # fmt: skip
        """patience_s: how long a busy controller is asked to take each job. patient: as long for every other answer,
        because nobody waits for this one."""
        self.patience_s: float = patience_s
        self.answer_s: float = patience_s if patient else 0.0
        excluded = [profile.exclude, *sorted(run.ledger().overrides(time.time()).excluded)]
        self.run: RunDir = run
        self.profile: ClusterProfile = profile.model_copy(update={"exclude": ",".join(filter(None, excluded)) or None})
        self.plan: RunPlan = _warned_in_time(run, plan)
        client.use(profile.scheduler.slurm_conf if profile.scheduler else None)

    def submit(self, request: Request) -> Submitted:
        """Queue a stage's job, or the recovery job."""
        name = AND.join(GUARD if stage == RECOVERY else stage for stage in request.stages)
        if request.stages == (RECOVERY,):
            job = self._recovery_executor(request).queue(
                f"the recovery job of {self.run.name}", patience_s=self.patience_s
            )
            return Submitted(stage=RECOVERY, job_id=job, nonce=request.nonce)
        asked = batch.request(self.profile, self.plan, request.stages)
        made = executor(
            self.profile, self.plan, request.stages, self.run.provenance(), run=self.run.path,
            comment=comments.write(self.run.name, request.stages, request.nonce), after=request.after_ok,
        )  # fmt: skip
        for stage in request.stages:  # Slurm makes no folders for logs
            (self.run.slurm / stage).mkdir(parents=True, exist_ok=True)
        return Submitted(
            stage=request.stages[0], nonce=request.nonce,
            job_id=made.queue(f"{name} of {self.run.name}", patience_s=self.patience_s),
            mem_mib=asked.mem_gib * 1024, node_mem_mib=_node_mem_mib(self.profile, asked),
        )  # fmt: skip

    def queue(self) -> list[Job]:
        return retry.patiently(client.jobs, patience_s=self.answer_s)

    def look(self, job_ids: Collection[str]) -> SchedulerView:
        """As `Scheduler.look`; Unavailable also where accounting fails and the queue has forgotten one of the jobs."""

        def ask() -> SchedulerView:
            answer = slurm_queue.ask(job_ids)
            if unknown := answer.unknown(sorted(job_ids)):
                raise Unavailable(f"how job {', '.join(unknown)} ended cannot be learned: {answer.trouble}")
            return answer.view()

        return retry.patiently(ask, patience_s=self.answer_s)

    def cancel(self, job_ids: Iterable[str]) -> None:
        jobs = list(job_ids)
        retry.patiently(lambda: client.cancel(jobs), patience_s=self.answer_s)

    def queue_image(self) -> str | None:
        """The job that builds the run's image, in front of the chain; None where it is there, or none is used."""
        from jobs import image

        checkout = Path(self.run.provenance()["checkout"])
        job = image.job_before(self.profile, checkout, patience_s=self.patience_s)
        if job:
            self.run.record(Submitted(stage=IMAGE, job_id=job))
        return job

    def _recovery_executor(self, request: Request) -> ModuleExecutor:
        cache = Path(self.run.provenance()["cache"])
        variables = batch.environment(self.profile, self.plan, STAGES[0], run=self.run.path, cache=cache)
        made = ModuleExecutor(
            self.run.slurm / GUARD, python=shlex.quote(variables["FT_PYTHON"]),
            module=f"jobs.guard {shlex.quote(str(self.run.path))}",
        )  # fmt: skip
        parameters = batch.small_parameters(
            self.profile, name=f"{self.run.name}.{GUARD}", setup=batch.enter(self.profile, variables, self.run.code),
            comment=comments.write(self.run.name, [RECOVERY], request.nonce),
            # Any of them; when all complete, the dependency can never be met and Slurm removes the recovery job.
            dependency="?".join(f"afternotok:{job}" for job in request.after_not_ok),
        )  # fmt: skip
        made.update_parameters(**parameters)
        return made


def site_of(run: RunDir, profile: ClusterProfile, *, patient: bool = False) -> SlurmSite:
    """The scheduler of a run, for what is submitted now; `patient`: nobody waits for it."""
    patience_s = retry.RECOVERY_S if patient else retry.SUBMIT_S
    return SlurmSite(run, profile, RunPlan.model_validate(run.plan()), patience_s=patience_s, patient=patient)


def _node_mem_mib(profile: ClusterProfile, asked: StagePlan) -> int:
    """Memory that a job may use on a node of its partition, in MiB."""
    return int(1024 * profile.partition(gpu=asked.gpus_per_node > 0).mem_gib_per_node)


def _warned_in_time(run: RunDir, plan: RunPlan) -> RunPlan:
    """The plan, with a warning before the time limit that the slowest save of earlier attempts would need."""
    saves = [event.seconds for event in run.ledger().of(CheckpointSaved)]
    train = plan.stages["train"]
    longer = train.model_copy(update={"warning_s": max(train.warning_s, 60 + math.ceil(1.5 * max(saves, default=0)))})
    return plan.model_copy(update={"stages": {**plan.stages, "train": longer}})
