"""One run's jobs as Slurm gets them, through submitit. What is queued and when: ftlib/runs/chain.py."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from ftlib.errors import Unavailable
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import comments
from ftlib.runs.comments import AND, GUARD
from ftlib.runs.events import Submitted
from ftlib.runs.ledger import IMAGE, RECOVERY
from ftlib.runs.scheduler import Job, Request, SchedulerView
from ftlib.slurm import batch, client, container, requests, retry
from ftlib.slurm import queue as slurm_queue
from jobs import placement
from jobs.placement import Placement

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
        self, run: RunDir, where: Callable[[], Placement], *, slurm_conf: str | None,
        patience_s: float = retry.SUBMIT_S, patient: bool = False,
    ) -> None:  # fmt: skip
        """where: answers where the run's jobs go at the moment of each submission. patience_s: how long a busy
        controller is asked to take each job. patient: as long for every other answer, because nobody waits for it."""
        self.patience_s: float = patience_s
        self.answer_s: float = patience_s if patient else 0.0
        self.run: RunDir = run
        self._where: Callable[[], Placement] = where
        client.use(slurm_conf)

    @property
    def jobs(self) -> tuple[tuple[str, ...], ...]:
        """The stages of each job of the chain."""
        return self._where().plan.jobs

    def submit(self, request: Request) -> Submitted:
        """Queue a stage's job, or the recovery job."""
        name = AND.join(GUARD if stage == RECOVERY else stage for stage in request.stages)
        if request.stages == (RECOVERY,):
            job = self._recovery_executor(request).queue(
                f"the recovery job of {self.run.name}", patience_s=self.patience_s
            )
            return Submitted(stage=RECOVERY, job_id=job, nonce=request.nonce)
        where = self._where()
        made = executor(
            where.profile, where.plan, request.stages, self.run.provenance(), run=self.run.path,
            comment=comments.write(self.run.name, request.stages, request.nonce), after=request.after_ok,
        )  # fmt: skip
        requests.write(self.run.path, where.profile, where.plan, request.stages)
        job = made.queue(f"{name} of {self.run.name}", patience_s=self.patience_s)
        requests.keep(self.run.path, request.stages, job)
        memory = requests.memory(where.profile, batch.request(where.profile, where.plan, request.stages))
        return Submitted(
            stage=request.stages[0], nonce=request.nonce, job_id=job, mem_mib=memory.requested_mib,
            node_mem_mib=memory.node_mib,
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
        job = image.job_before(self._where().profile, checkout, patience_s=self.patience_s)
        if job:
            self.run.record(Submitted(stage=IMAGE, job_id=job))
        return job

    def _recovery_executor(self, request: Request) -> ModuleExecutor:
        where, cache = self._where(), Path(self.run.provenance()["cache"])
        variables = batch.environment(where.profile, where.plan, STAGES[0], run=self.run.path, cache=cache)
        made = ModuleExecutor(
            self.run.slurm / GUARD, python=shlex.quote(variables["FT_PYTHON"]),
            module=f"jobs.guard {shlex.quote(str(self.run.path))}",
        )  # fmt: skip
        parameters = batch.small_parameters(
            where.profile, name=f"{self.run.name}.{GUARD}", setup=batch.enter(where.profile, variables, self.run.code),
            comment=comments.write(self.run.name, [RECOVERY], request.nonce),
            # Any of them; when all complete, the dependency can never be met and Slurm removes the recovery job.
            dependency="?".join(f"afternotok:{job}" for job in request.after_not_ok),
        )  # fmt: skip
        made.update_parameters(**parameters)
        return made


def site_of(run: RunDir, *, patient: bool = False) -> SlurmSite:
    """The scheduler of a run, for what is submitted now; `patient`: nobody waits for it."""
    scheduler = placement.owners_profile(run).scheduler
    return SlurmSite(
        run, placement.Placer(run).now, slurm_conf=scheduler.slurm_conf if scheduler else None,
        patience_s=retry.RECOVERY_S if patient else retry.SUBMIT_S, patient=patient,
    )  # fmt: skip
