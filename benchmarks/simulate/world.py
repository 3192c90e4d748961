"""One run at one site: its folder, its Slurm, its processes, and the truth about each attempt, which only the
invariants may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.simulate.commands import Sbatch, SimulatedController, SimulatedScheduler
from benchmarks.simulate.files import RunFiles, Store
from benchmarks.simulate.kernel import Kernel, Process
from benchmarks.simulate.slurm import Job, Site, Slurm
from ftlib.runs import overrides
from ftlib.runs.ledger import STAGES

RUN = "run-1"


@dataclass(frozen=True)
class Scenario:
    """What is fixed for one history."""

    site: Site = field(default_factory=Site)
    jobs: tuple[tuple[str, ...], ...] = (("prepare",), ("train",), ("export",), ("evaluate",))  # stages of each job
    pieces: int = 4  # saves of a training; other stages have fewer
    piece_s: float = 1800.0
    save_s: float = 20.0
    load_s: float = 60.0
    limit_s: float = 3 * 3600.0  # time limit of a stage
    skews_s: tuple[tuple[str, float], ...] = ()  # machine -> how far its clock is ahead
    micro_batch: int = 8
    fitting_micro_batch: int = 8  # with more than that the GPU's memory runs out
    needed_mib: int = 2000  # with less than that the host's memory runs out
    bad_node: str = ""  # its GPUs are faulty

    def skew_s(self, machine: str) -> float:
        return dict(self.skews_s).get(machine, 0.0)


@dataclass
class Truth:
    """What really happened to one attempt."""

    stage: str
    number: int
    job: Job
    start: int  # which start of the job
    node: str
    began: float
    causes: set[str] = field(default_factory=set)  # all that hit it
    process: Process | None = None
    srun_began: float | None = None
    ended: float | None = None
    exit_code: int | None = None  # srun's
    restored_at: float | None = None  # it has read the newest checkpoint
    restored: int = 0
    log_begin: int = 0  # lines of its job's log that earlier attempts wrote
    fate: str = ""  # a cause of which it will die


@dataclass(frozen=True)
class Violation(Exception):
    """An invariant does not hold."""

    invariant: str
    message: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.message}"


class World:
    """Everything there is in one history."""

    def __init__(self, scenario: Scenario, seed: str, *, tracing: bool = False) -> None:
        from benchmarks.simulate import batch

        self.scenario: Scenario = scenario
        self.kernel: Kernel = Kernel(seed, tracing=tracing)
        self.files: RunFiles = RunFiles(
            self.kernel, name=RUN, micro_batch=scenario.micro_batch, rows_of_a_rank=2 * scenario.micro_batch
        )  # fmt: skip
        self.slurm: Slurm = Slurm(self.kernel, scenario.site, lambda job: batch.script(self, job))
        self.slurm.on_hit = self.hit
        self.slurm.on_notice = lambda job, line: self.log(job.stages[0], job.id).append(line)
        self._outages_end: float = 0.0
        self._logs: dict[tuple[str, str], list[str]] = {}
        self.sbatch: Sbatch = Sbatch()
        self.truths: dict[tuple[str, int], Truth] = {}
        self.fates: list[str] = []  # causes of which the next attempts die
        self.violations: list[Violation] = []
        # The owner: what was asked for, and whether the commands got through.
        self.cancelled_at: float | None = None  # the owner has cancelled the run, and has asked for nothing since
        self.cancel_given: bool = False  # the owner has cancelled something
        self.owner_satisfied: bool = False  # the last command that queues jobs ended well
        self.recovery_hit: bool = False  # a recovery job was killed or lost
        self.on_srun: Callable[[Truth], None] = lambda truth: None
        self.on_commit: Callable[[Truth, int], None] = lambda truth, step: None

    # -- what processes need ---------------------------------------------------------------------------------------

    def store(self) -> Store:
        """The run folder for the current process."""
        process = self.kernel.me
        skew_s = self.scenario.skew_s(process.machine)
        return Store(self.files, writer=process.name.replace(" ", "-"), skew_s=skew_s)

    def scheduler(self) -> SimulatedScheduler:
        """Slurm's commands for the current process. Requests are derived from the overrides of this moment."""
        limits_s = {stage: self.scenario.limit_s for stage in STAGES}
        scheduler = SimulatedScheduler(self.slurm, self.sbatch, run=RUN, limits_s=limits_s)
        scheduler.current_overrides = lambda: overrides.fold(self.files.now_ledger().events, self.kernel.now)
        return scheduler

    def controller(self) -> SimulatedController:
        return SimulatedController(self.slurm)

    def sleep(self, seconds: float) -> None:
        """`time.sleep` of the current process."""
        self.kernel.operation(f"sleep {seconds:.0f} s", 0.0)
        self.kernel.pause(seconds)

    # -- the truth -------------------------------------------------------------------------------------------------

    def hit(self, job: Job, cause: str) -> None:
        """Something happens to a job: its present attempt may end of it."""
        if "recovery" in job.stages:
            if cause != "time limit" or self.outage_since(job.rows[-1].start):
                self.recovery_hit = True
            return
        job.hits.append((job.starts, cause))
        for truth in self.truths.values():
            if truth.job is job and truth.start == job.starts:
                truth.causes.add(cause)

    def outage(self, seconds: float) -> None:
        """Something that every process needs is away from now on, for so long."""
        self._outages_end = max(self._outages_end, self.kernel.now + seconds)

    def outage_since(self, moment: float) -> bool:
        """Whether something was away at that moment or later."""
        return self._outages_end >= moment

    def log(self, stage: str, job_id: str) -> list[str]:
        """The lines of the log of a job (of several stages: of one of them). All its attempts append to it."""
        return self._logs.setdefault((stage, job_id), [])

    def newest(self, stage: str) -> Truth | None:
        """The truth of a stage's newest attempt."""
        attempts = self.files.attempts.get(stage, ())
        return self.truths.get((stage, len(attempts)))

    def violate(self, invariant: str, message: str) -> None:
        """An invariant does not hold."""
        self.kernel.trace(f"VIOLATION {invariant}: {message}")
        self.violations.append(Violation(invariant, message))
