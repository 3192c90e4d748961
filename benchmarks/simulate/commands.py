"""Slurm's commands as the processes of a run use them: `Scheduler` on a login node and in the recovery job,
`Controller` in a batch script. Every call takes a while, may be the caller's last, and may get no answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.simulate.kernel import Kernel
from benchmarks.simulate.slurm import RECOVERY_LIMIT_S, Slurm
from benchmarks.simulate.slurm import Job as SlurmJob
from ftlib.errors import FtError, Unavailable
from ftlib.runs import comments
from ftlib.runs.events import Submitted
from ftlib.runs.ledger import RECOVERY
from ftlib.runs.overrides import Overrides
from ftlib.runs.scheduler import Accounting, Job, Request, SchedulerView

CALL_S = 0.3
# As in `ftlib.slurm.retry`: how long sbatch is tried again, and the seconds between two tries.
PATIENCE_S = 180.0
PAUSES_S = (5.0, 10.0, 20.0, 30.0)
# What accounting says of a job that the controller does not know any more is no end.
BEGUN = ("PENDING", "RUNNING")


@dataclass
class Sbatch:
    """What happens to the next calls of sbatch; set by the driver."""

    refuse: int = 0  # so many are refused
    lose_answer: int = 0  # so many queue their job, and the caller is told of a time-out
    late: list[float] = field(default_factory=list)  # the same, and the job appears so many seconds later
    lose_job: int = 0  # the controller takes the job and dies before it is on disk


class SimulatedScheduler:
    """`ftlib.runs.scheduler.Scheduler` of one process."""

    def __init__(
        self, slurm: Slurm, sbatch: Sbatch, *, run: str, limits_s: Mapping[str, float]
    ) -> None:
        self._slurm: Slurm = slurm
        self._sbatch: Sbatch = sbatch
        self._run: str = run
        self._limits_s: Mapping[str, float] = limits_s
        # What requests are derived from.
        self.current_overrides: Callable[[], Overrides] = Overrides
        self._kernel: Kernel = slurm.kernel

    def submit(self, request: Request) -> Submitted:
        comment = comments.write(self._run, request.stages, request.nonce)
        deadline, tries = self._kernel.now + PATIENCE_S, 0
        while True:
            tries += 1
            try:
                job = self._sbatch_once(request, comment)
                break
            except Unavailable:
                self._pause(PAUSES_S[min(tries, len(PAUSES_S)) - 1])
            if found := self._with(comment, deadline):
                job = found[0]
                break
            if self._kernel.now > deadline:
                raise Unavailable(f"sbatch does not answer for {'+'.join(request.stages)}")
        if tries > 1:
            job = self._keep_first(job, comment)
        return Submitted(
            stage=request.stages[0], job_id=job.id, nonce=request.nonce, mem_mib=job.mem_mib, node_mem_mib=8000
        )  # fmt: skip

    def _sbatch_once(self, request: Request, comment: str) -> SlurmJob:
        what = "+".join(request.stages)
        self._call(f"sbatch {what} {request.after_ok or ''}")
        if self._sbatch.refuse:
            self._sbatch.refuse -= 1
            self._kernel.trace("slurm: sbatch is refused")
            raise FtError(f"sbatch refused {what}")
        unknown = request.after_ok is not None and self._slurm.known(request.after_ok) is None
        if unknown or any(self._slurm.known(job) is None for job in request.after_not_ok):
            raise FtError(f"sbatch refused {what}: Job dependency problem")
        now = self.current_overrides()
        job = SlurmJob(
            id="", stages=request.stages, comment=comment,
            limit_s=RECOVERY_LIMIT_S if request.stages == (RECOVERY,) else sum(map(self._limits_s.get, request.stages)),
            after_ok=request.after_ok, after_not_ok=request.after_not_ok, excluded=now.excluded,
            mem_mib=max((now.memory_mib.get(stage, 4000) for stage in request.stages), default=4000),
        )  # fmt: skip
        if self._sbatch.late:
            job.late = True
            self._kernel.push(self._sbatch.late.pop(), self._slurm.submit, job)
            raise Unavailable("sbatch: Socket timed out on send/recv operation")
        self._slurm.submit(job)
        if self._sbatch.lose_job:
            self._sbatch.lose_job -= 1
            self._kernel.push(0.5, self._slurm.forget, job.id)
            self._slurm.lose_controller(60)
        if self._sbatch.lose_answer:
            self._sbatch.lose_answer -= 1
            raise Unavailable("sbatch: Socket timed out on send/recv operation")
        self._kernel.operation(f"sbatch answers {job.id}", CALL_S)
        return job

    def _with(self, comment: str, deadline: float) -> list[SlurmJob]:
        """The jobs of that comment, the first one first; none where the controller does not answer until then."""
        while True:
            self._kernel.operation("squeue", CALL_S)
            if self._slurm.up:
                return [job for job in list(self._slurm.jobs.values()) if job.comment == comment and not job.over]
            if self._kernel.now > deadline:
                raise Unavailable("squeue does not answer")
            self._pause(PAUSES_S[-1])

    def _keep_first(self, job: SlurmJob, comment: str) -> SlurmJob:
        """Of the jobs that one submission has queued the first; the others are cancelled."""
        first, *others = sorted({job.id, *(one.id for one in self._with(comment, self._kernel.now))})
        self.cancel(others)
        return self._slurm.jobs[first]

    def _pause(self, seconds: float) -> None:
        self._kernel.operation(f"sleep {seconds:.0f} s", 0.0)
        self._kernel.pause(seconds)

    def queue(self) -> list[Job]:
        self._call("squeue")
        known = (self._slurm.known(job_id) for job_id in list(self._slurm.jobs))
        return [Job(job.shown, comment=job.comment, id=job.id) for job in known if job is not None]

    def look(self, job_ids: Collection[str]) -> SchedulerView:
        """As `SlurmSite.look`: Unavailable where the queue does not answer, or accounting does not of a job that the
        queue has forgotten."""
        self._call("squeue")
        jobs = {job_id: Job("") for job_id in sorted(job_ids)}
        for job_id in jobs:
            if (job := self._slurm.known(job_id)) is not None:
                jobs[job_id] = Job(job.shown, comment=job.comment, id=job_id)
        accounting: Accounting = "answered"
        if any(not job.state for job in jobs.values()):
            self._kernel.operation("sacct", CALL_S)
            if self._slurm.site.accounting == "disabled":
                accounting = "disabled"
            elif not self._slurm.accounting_up:
                raise Unavailable("sacct: Unable to contact slurmdbd")
            else:
                jobs.update(self._accounted([job_id for job_id, job in jobs.items() if not job.state]))
        return SchedulerView(jobs=jobs, accounting=accounting)

    def see(self, job_ids: Collection[str]) -> SchedulerView:
        """What `make status` makes of the answers: silence is no error there."""
        try:
            view = self.look(job_ids)
        except Unavailable:
            return SchedulerView(answered=False)
        known = {job_id: job for job_id, job in view.jobs.items() if job.state}
        return SchedulerView(jobs=known, accounting=view.accounting)

    def cancel(self, job_ids: Iterable[str]) -> None:
        listed = list(job_ids)
        if not listed:
            return
        self._call(f"scancel {' '.join(listed)}")
        for job_id in listed:
            if self._slurm.known(job_id) is not None:
                self._slurm.cancel(job_id)
        self._kernel.operation("scancel answers", CALL_S)

    def _accounted(self, job_ids: list[str]) -> dict[str, Job]:
        rows = {job_id: self._slurm.accounted(job_id) for job_id in job_ids}
        states = {job_id: some[-1].state for job_id, some in rows.items() if some}
        return {job_id: Job(state, id=job_id) for job_id, state in states.items() if state not in BEGUN}

    def _call(self, what: str) -> None:
        self._kernel.operation(what, CALL_S)
        if not self._slurm.up:
            raise Unavailable(f"{what.split()[0]}: Unable to contact slurm controller")


class SimulatedController:
    """`ftlib.runs.scheduler.Controller` of a batch script."""

    def __init__(self, slurm: Slurm) -> None:
        self._slurm: Slurm = slurm

    def state(self, job_id: str) -> str | None:
        if not self._call("scontrol show job"):
            return None
        job = self._slurm.known(job_id)
        return None if job is None else job.shown

    def restarts(self, job_id: str) -> int | None:
        if not self._call("scontrol show job"):
            return None
        job = self._slurm.known(job_id)
        return None if job is None else job.restarts

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        how = "Incomplete" if incomplete_only else ""
        return self._call(f"scontrol requeue {how}") and self._slurm.requeue(job_id, incomplete_only=incomplete_only)

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        answered = self._call(f"scontrol update {' '.join(f'{name}={value}' for name, value in changes.items())}")
        wait = changes.get("StartTime", "now").removeprefix("now").removeprefix("+")
        accepted = answered and self._slurm.update(
            job_id, start_in_s=float(wait or 0), excluded=changes.get("ExcNodeList", ""),
            mem_mib=int(changes.get("MinMemoryNode", "0")),
        )  # fmt: skip
        if not accepted and job_id in self._slurm.jobs:
            self._slurm.jobs[job_id].changes_refused = True
        return accepted

    def _call(self, what: str) -> bool:
        self._slurm.kernel.operation(what, CALL_S)
        return self._slurm.up
