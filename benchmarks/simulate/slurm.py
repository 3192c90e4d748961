"""Slurm in memory, as far as runs can see it: jobs, dependencies, time limits, preemption, lost nodes, a controller
that goes away, and accounting that is late, away or disabled.

What it does was seen on Slurm 22.05 (tests of the real one are in tests/test_chain.py and tests/test_cluster.py):

- A job that is cancelled, requeued, preempted or at its limit gets SIGTERM, and SIGKILL after `kill_wait_s`; while its
  processes end, squeue and scontrol call it COMPLETING, and accounting knows its end already.
- `requeue Incomplete` exits with 0 whatever the job's state, and has no effect on a job that was cancelled or is at its
  time limit; a plain requeue revives both. What shows the difference is an update of the start time: it is accepted of
  a job that goes back to the queue, and refused of one that has ended.
- A preempted job that ends within its grace is COMPLETED or FAILED by its exit code.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.simulate.kernel import Kernel, Process
from ftlib.runs.scheduler import FAILED

RECOVERY_LIMIT_S = 600.0
# State -> why, in the notice that slurmd writes into the log when it begins to end a job.
NOTICES = {
    "CANCELLED": "", "TIMEOUT": " DUE TO TIME LIMIT", "PREEMPTED": " DUE TO PREEMPTION",
    "REQUEUED": " DUE TO JOB REQUEUE",
}  # fmt: skip
# From an event until the scheduler looks at the queue again.
PASS_S = 5.0
# Slurm's times are of whole seconds: what happens to a job so soon after its start may be told of that start.
INDISTINCT_S = 4.0
FAILED_ENDS = (*FAILED, "CANCELLED", "PREEMPTED")


@dataclass(frozen=True)
class Site:
    """How a site has set up its Slurm."""

    nodes: tuple[str, ...] = ("n1", "n2", "n3")
    may_requeue: bool = True
    grace_s: float = 0.0  # between the warning of a preemption and SIGKILL
    kill_wait_s: float = 30.0
    warning_s: float = 120.0  # before the time limit (--signal=USR2@…)
    requeue_wait_s: float = 120.0  # until a requeued job may start
    min_job_age_s: float = 300.0  # then the controller forgets a job that has ended
    queue_wait_s: float = 30.0  # a job waits about so long
    accounting: str = "answered"  # or "disabled"
    accounting_late_s: float = 1.0
    incomplete_is_always_accepted: bool = True  # `scontrol requeue Incomplete` exits with 0 where it does nothing
    accounts_memory: bool = False  # a job that ran out of memory is OUT_OF_MEMORY, not FAILED
    arrays: bool = False  # job ids look like those of an array's tasks


@dataclass
class Row:
    """Accounting's row of one start of a job."""

    start: float
    state: str = "RUNNING"
    ended: float | None = None
    shell_signal: int = 0  # that ended the batch shell


@dataclass
class Job:
    """A job, as the controller has it."""

    id: str
    stages: tuple[str, ...]
    comment: str
    limit_s: float
    after_ok: str | None = None
    after_not_ok: tuple[str, ...] = ()
    state: str = "PENDING"
    completing: bool = False
    back_to_queue: bool = False  # it is requeued as soon as its processes are gone
    not_before: float = 0.0
    excluded: tuple[str, ...] = ()
    mem_mib: int = 0
    wait_s: float = 0.0  # before its next start, by an update
    node: str = ""
    ended: float = 0.0
    batch: Process | None = None
    steps: list[Process] = field(default_factory=list)
    children: list[Process] = field(default_factory=list)  # programs of the batch shell
    out_of_memory: bool = False
    changes_refused: bool = False  # an update did not get through
    queued: float = 0.0
    late: bool = False  # its sbatch was answered with a time-out, and the controller took it later all the same
    hits: list[tuple[int, str]] = field(default_factory=list)  # which start was hit, and by what
    rows: list[Row] = field(default_factory=list)
    starts: int = 0
    cancelled_start: int | None = None  # which start of it scancel has ended, or 0, whatever happened to it afterwards
    by_owner: bool = False  # its owner has cancelled it, and nobody has revived it
    by_dependency: bool = False  # Slurm has cancelled it, for what it waits for has failed
    cancelled_waiting: bool = False  # it was cancelled while it waited
    preempted: float | None = None  # scontrol's PreemptTime

    @property
    def over(self) -> bool:
        """Whether it has ended and will not start again by itself."""
        return self.state not in ("PENDING", "RUNNING") and not self.completing

    @property
    def shown(self) -> str:
        """Its state in squeue and scontrol."""
        return "COMPLETING" if self.completing else self.state

    @property
    def restarts(self) -> int:
        """How often it went back to the queue."""
        return max(0, self.starts - (0 if self.state == "PENDING" else 1))

    @property
    def ends(self) -> float:
        """When its time limit is reached."""
        return self.rows[-1].start + self.limit_s


class Slurm:
    """The controller, the nodes and accounting of one site."""

    def __init__(self, kernel: Kernel, site: Site, start: Callable[[Job], int]) -> None:
        """start: what a job's batch script does; returns its exit code."""
        self.kernel: Kernel = kernel
        self.site: Site = site
        self.jobs: dict[str, Job] = {}
        self.up: bool = True
        self.accounting_up: bool = True
        self.down_nodes: set[str] = set()
        self.on_state: Callable[[Job], None] = lambda job: None  # an observer's
        self.on_hit: Callable[[Job, str], None] = lambda job, cause: None  # an observer's: what happens to a job
        self.on_notice: Callable[[Job, str], None] = lambda job, line: None  # a line in the log of the batch shell
        self._start: Callable[[Job], int] = start
        self._waiting: list[Callable[[], None]] = []  # what happens when the controller is back
        self._pass_due: bool = False
        self._random: random.Random = random.Random(f"{kernel.seed} slurm")
        self._next_id: int = 1000

    # -- what commands do ------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> Job:
        """Queue a job."""
        self._next_id += 1
        job.id = f"{self._next_id}_{self._next_id % 7}" if self.site.arrays else str(self._next_id)
        wait_s = self.site.queue_wait_s * self._random.expovariate(1.0)
        job.not_before = self.kernel.now + (wait_s if job.stages != ("recovery",) else min(wait_s, 3600.0))
        job.queued = self.kernel.now
        self.jobs[job.id] = job
        self.kernel.trace(f"slurm: {job.id} queued for {'+'.join(job.stages)}")
        self.on_state(job)
        self._pass_soon()
        return job

    def cancel(self, job_id: str) -> None:
        """scancel."""
        job = self.jobs.get(job_id)
        if job is None or (job.state not in ("PENDING", "RUNNING") and not job.back_to_queue):
            return
        job.by_owner, job.cancelled_start = True, job.starts
        self.kernel.trace(f"slurm: {job.id} ({'+'.join(job.stages)}) is cancelled")
        job.back_to_queue = False
        if job.state == "PENDING":
            job.cancelled_waiting = True
            if job.rows and self.kernel.now - job.rows[-1].start < INDISTINCT_S:
                self.on_hit(job, "cancelled")
            self._over(job, "CANCELLED")
            return
        self.on_hit(job, "cancelled")
        self._end(job, "CANCELLED")

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        """scontrol requeue [Incomplete]; whether its exit code is 0."""
        job = self.known(job_id)
        if job is None or not self.site.may_requeue:
            return False
        if job.state == "RUNNING":
            job.back_to_queue = True
            self._end(job, "REQUEUED")
            return True
        if incomplete_only:
            return self.site.incomplete_is_always_accepted
        if job.state == "PENDING" or job.back_to_queue:
            return False
        self._revive(job)
        if not job.completing:
            self._back_to_queue(job)
        return True

    def update(self, job_id: str, *, start_in_s: float = 0.0, excluded: str = "", mem_mib: int = 0) -> bool:
        """scontrol update of a job that waits, or will as soon as its processes are gone; whether it is accepted."""
        job = self.known(job_id)
        if job is None or not (job.state == "PENDING" or job.back_to_queue):
            return False
        job.wait_s = max(job.wait_s, start_in_s)
        job.excluded = tuple(excluded.split(",")) if excluded else job.excluded
        job.mem_mib = mem_mib or job.mem_mib
        return True

    def known(self, job_id: str) -> Job | None:
        """A job, as long as the controller remembers it."""
        job = self.jobs.get(job_id)
        return None if job is None or self._forgotten(job) else job

    def accounted(self, job_id: str) -> list[Row]:
        """Accounting's rows of a job, the first start first, as late as accounting is."""
        job = self.jobs.get(job_id)
        seen = self.kernel.now - self.site.accounting_late_s
        rows = []
        for row in job.rows if job else ():
            ended = row.ended is not None and row.ended <= seen
            if row.start <= seen:
                rows.append(row if ended else Row(row.start))
        if job and not job.rows and job.over and job.ended <= seen:
            rows.append(Row(job.ended, job.state, job.ended))
        return rows

    # -- what happens to jobs --------------------------------------------------------------------------------------

    def preempt(self, job: Job) -> None:
        """Another job with a higher claim takes the node."""
        if job.state != "RUNNING":
            return
        self.kernel.trace(f"slurm: {job.id} is preempted, {self.site.grace_s:.0f} s of grace")
        job.preempted = self.kernel.now
        self.on_hit(job, "preemption")
        start = job.starts
        if self.site.grace_s:
            self._warn(job, "TERM")
            self.kernel.push(self.site.grace_s, self._preempted, job, start)
        else:
            self._preempted(job, start)

    def _preempted(self, job: Job, start: int) -> None:
        if job.state != "RUNNING" or job.starts != start:
            return
        job.back_to_queue = self.site.may_requeue
        self._end(job, "PREEMPTED", kill_wait_s=0.0 if not self.site.grace_s else self.site.kill_wait_s)

    def lose_node(self, node: str, *, zombie: bool, seconds: float) -> None:
        """The controller gives a node up. zombie: its processes keep running, and end when the node is back."""
        if node in self.down_nodes:
            return
        self.down_nodes.add(node)
        self.kernel.trace(f"slurm: node {node} is lost, {'its processes live' if zombie else 'with all on it'}")
        for job in list(self.jobs.values()):
            if job.node != node or job.over or job.state == "PENDING":
                continue
            self.on_hit(job, "node failure")
            processes = [process for process in (job.batch, *job.children, *job.steps) if process is not None]
            job.batch, job.steps, job.children = None, [], []
            for process in processes:
                if zombie:
                    process.lost = True
                else:
                    process.kill()
            if self.up:
                self._node_failed(job)
            else:
                self._waiting.append(lambda job=job: self._node_failed(job))  # type: ignore[misc]
        self.kernel.push(seconds, self._node_back, node)

    def _node_failed(self, job: Job) -> None:
        if job.over or job.state == "PENDING":
            return
        if job.state == "RUNNING":
            self._row(job, "NODE_FAIL")
            job.state = "NODE_FAIL"
            job.back_to_queue = self.site.may_requeue
        job.completing = True
        self._gone(job)

    def _node_back(self, node: str) -> None:
        self.down_nodes.discard(node)
        self.kernel.trace(f"slurm: node {node} is back")
        self.kernel.push(5.0, self._end_lost, node)
        self._pass_soon()

    def _end_lost(self, node: str) -> None:
        """slurmd ends what the controller does not know on its node."""
        for process in self.kernel.processes:
            if process.lost and process.machine == node:
                process.kill()

    def lose_controller(self, seconds: float) -> None:
        """The controller stops; a job that it took in this second is lost with it."""
        if not self.up:
            return
        self.up = False
        self.kernel.trace(f"slurm: the controller is away for {seconds:.0f} s")
        self.kernel.push(seconds, self._controller_back)

    def forget(self, job_id: str) -> None:
        """Lose a job that the controller had in memory alone."""
        self.kernel.trace(f"slurm: {job_id} is lost with the controller")
        self.on_hit(self.jobs[job_id], "lost")
        del self.jobs[job_id]

    def _controller_back(self) -> None:
        self.up = True
        self.kernel.trace("slurm: the controller is back")
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            act()
        self._pass_soon()

    # -- starts and ends -------------------------------------------------------------------------------------------

    def _pass_soon(self) -> None:
        if not self._pass_due:
            self._pass_due = True
            self.kernel.push(PASS_S * self._random.random(), self._pass)

    def _pass(self) -> None:
        """Start what may start, and cancel what never will."""
        self._pass_due = False
        if not self.up:
            self._waiting.append(self._pass_soon)
            return
        nodes = [node for node in self.site.nodes if node not in self.down_nodes]
        next_begin = None
        for job in list(self.jobs.values()):
            if job.state != "PENDING" or job.completing:
                continue
            ready = self._dependency(job)
            if ready is None:
                continue
            if not ready:
                job.by_dependency = not job.by_owner
                self.kernel.trace(f"slurm: {job.id} ({'+'.join(job.stages)}) will never start: cancelled")
                self._over(job, "CANCELLED" if job.stages != ("recovery",) or job.after_not_ok else "COMPLETED")
                continue
            if job.not_before > self.kernel.now:
                next_begin = min(next_begin or job.not_before, job.not_before)
                continue
            allowed = [node for node in nodes if node not in job.excluded]
            if allowed:
                self._begin(job, self._random.choice(allowed))
        if next_begin is not None and not self._pass_due:
            self._pass_due = True
            self.kernel.push(next_begin - self.kernel.now + 0.1, self._pass)

    def _dependency(self, job: Job) -> bool | None:
        """Whether what a job waits for has come; None while that is open."""
        if job.after_ok is not None:
            other = self.jobs.get(job.after_ok)
            if other is None:
                return False
            return (other.state == "COMPLETED") if other.over else None
        if job.after_not_ok:
            others = [self.jobs.get(one) for one in job.after_not_ok]
            ended = [one for one in others if one is not None and one.over]
            if any(one.state in FAILED_ENDS for one in ended):
                return True
            return False if len(ended) == sum(one is not None for one in others) else None
        return True

    def _begin(self, job: Job, node: str) -> None:
        job.state, job.node, job.preempted, job.out_of_memory = "RUNNING", node, None, False
        job.starts += 1
        job.rows.append(Row(self.kernel.now))
        self.kernel.trace(f"slurm: {job.id} starts on {node} (start {job.starts})")
        start = job.starts
        self.on_state(job)
        job.batch = self.kernel.spawn(f"batch {job.id}", "batch", node, lambda: self._batch(job, start), job=job)
        self.kernel.push(job.limit_s - self.site.warning_s, self._warning, job, start)
        self.kernel.push(job.limit_s, self._limit, job, start)

    def _batch(self, job: Job, start: int) -> None:
        code = self._start(job)
        if job.starts == start and not self.kernel.me.lost:
            self.kernel.push(0.1, self._batch_ended, job, start, code)

    def _batch_ended(self, job: Job, start: int, code: int) -> None:
        if not self.up:
            self._waiting.append(lambda: self._batch_ended(job, start, code))
            return
        if job.starts != start:
            return
        if job.state == "RUNNING":
            failed = "OUT_OF_MEMORY" if job.out_of_memory and self.site.accounts_memory else "FAILED"
            self._row(job, "COMPLETED" if code == 0 else failed)
            job.state = job.rows[-1].state
        for step in job.steps:
            step.kill()
        self._gone(job)

    def batch_killed(self, job: Job) -> None:
        """Someone has killed the batch shell: the job has failed, its steps get SIGTERM."""
        if job.batch is None or not job.batch.alive or job.state != "RUNNING":
            return
        self.on_hit(job, "killed")
        job.batch.kill()
        if job.steps:
            notice = f"*** STEP {job.id}.0 ON {job.node} FAILED (non-zero exit code or other failure mode) ***"
            self.on_notice(job, f"slurmstepd: error: {notice}")
        self._end(job, "FAILED")
        job.rows[-1].shell_signal = 9

    def _warning(self, job: Job, start: int) -> None:
        if job.state == "RUNNING" and job.starts == start:
            self.on_hit(job, "time limit")
            self._warn(job, "USR2")

    def _limit(self, job: Job, start: int) -> None:
        if not self.up:
            self._waiting.append(lambda: self._limit(job, start))
        elif job.state == "RUNNING" and job.starts == start:
            self.kernel.trace(f"slurm: {job.id} is at its time limit")
            self.on_hit(job, "time limit")
            self._end(job, "TIMEOUT")

    def _warn(self, job: Job, signal: str) -> None:
        for step in job.steps:
            step.signal(signal)

    def _end(self, job: Job, state: str, kill_wait_s: float | None = None) -> None:
        """SIGTERM now, SIGKILL later; the state counts from now."""
        self._row(job, state)
        job.state = state
        job.completing = True
        if state in NOTICES:
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self.kernel.now))
            notice = f"*** JOB {job.id} ON {job.node} CANCELLED AT {moment}{NOTICES[state]} ***"
            self.on_notice(job, f"slurmstepd: error: {notice}")
        self._warn(job, "TERM")
        self.on_state(job)
        wait_s = self.site.kill_wait_s if kill_wait_s is None else kill_wait_s
        self.kernel.push(wait_s, self._kill, job, job.starts)

    def _kill(self, job: Job, start: int) -> None:
        if job.starts != start or not job.completing:
            return
        for process in (*job.steps, *job.children, job.batch):
            if process is not None:
                process.kill()
        self._gone(job)

    def _gone(self, job: Job) -> None:
        """The job's processes are gone."""
        job.batch, job.steps, job.children = None, [], []
        if not self.up:
            self._waiting.append(lambda: self._gone(job))
            return
        if job.back_to_queue:
            self._back_to_queue(job)
        elif job.completing or job.ended == 0.0 or job.state not in ("PENDING", "RUNNING"):
            self._over(job, job.state)

    def _over(self, job: Job, state: str) -> None:
        job.state, job.completing, job.ended = state, False, self.kernel.now
        self.kernel.trace(f"slurm: {job.id} ({'+'.join(job.stages)}) is {state}")
        self.on_state(job)
        self._pass_soon()

    def _revive(self, job: Job) -> None:
        """A plain requeue takes back even what was cancelled."""
        job.back_to_queue, job.by_owner = True, False
        self.kernel.trace(f"slurm: {job.id} is revived")
        if job.rows:
            job.rows[-1].state = "REQUEUED"

    def _back_to_queue(self, job: Job) -> None:
        job.state, job.completing, job.back_to_queue, job.ended = "PENDING", False, False, 0.0
        job.not_before = self.kernel.now + max(self.site.requeue_wait_s, job.wait_s)
        job.wait_s = 0.0
        self.kernel.trace(f"slurm: {job.id} is back in the queue")
        self.on_state(job)
        self._pass_soon()

    def _row(self, job: Job, state: str) -> None:
        if job.rows and job.rows[-1].ended is None:
            job.rows[-1].state, job.rows[-1].ended = state, self.kernel.now

    def _forgotten(self, job: Job) -> bool:
        return job.over and self.kernel.now - job.ended > self.site.min_job_age_s
