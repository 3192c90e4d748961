"""One seed, one history: a random site, random injections at random moments, and what is left when all is quiet."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.simulate import attempt, invariants, owner
from benchmarks.simulate.kernel import BEGIN, Endless, Process
from benchmarks.simulate.slurm import Job, Site
from benchmarks.simulate.world import Scenario, Violation, World

LAYOUTS = (
    (("prepare",), ("train",), ("export",), ("evaluate",)),
    (("prepare",), ("train",), ("export", "evaluate")),
    (("prepare",), ("train", "export", "evaluate")),
)
ROLES = ("submit", "resume", "cancel", "scancel", "status", "batch", "prologue", "attempt", "epilogue", "recovery")
# What is injected, with its weight.
KINDS = {
    "kill": 12, "kill batch": 4, "kill step": 3, "die": 12, "preempt": 10, "node": 6, "zombie": 6, "controller": 6,
    "accounting": 4, "submit": 5, "resume": 6, "cancel": 7, "scancel": 6, "status": 6,
    "requeue by hand": 4, "refuse": 3, "lose answer": 4, "late sbatch": 4, "lose job": 2, "full": 2, "storm": 1,
}  # fmt: skip
MOST_INJECTIONS = 9
# Nothing is injected later than that after the beginning, in seconds.
LAST_S = 4 * 24 * 3600.0


@dataclass(frozen=True)
class Injection:
    """Something that happens: at a moment, or when a process of a role is at its n-th operation."""

    kind: str
    at_s: float | None = None  # since the beginning
    role: str = ""
    operation: int = 0
    detail: str = ""  # a cause, …
    seconds: float = 0.0  # how long it lasts

    def __str__(self) -> str:
        when = f"at {self.at_s:.0f} s" if self.at_s is not None else f"at operation {self.operation} of {self.role}"
        detail = f" {self.detail}" if self.detail else ""
        lasts = f" for {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.kind}{detail} {when}{lasts}"


@dataclass(frozen=True)
class History:
    """What a seed stands for."""

    seed: int
    scenario: Scenario
    injections: tuple[Injection, ...]


@dataclass
class Result:
    """How a history ended."""

    history: History
    violations: list[Violation]
    end: str  # "completed", "failed", "cancelled", "abandoned"
    trace: list[str] = field(default_factory=list)


def history_of(seed: int) -> History:
    """The history that a seed stands for."""
    dice = random.Random(seed)
    return History(seed, _scenario(dice), tuple(_injections(dice)))


def _scenario(dice: random.Random) -> Scenario:
    site = Site(
        may_requeue=dice.random() < 0.75,
        grace_s=dice.choice((0.0, 10.0, 120.0)),
        kill_wait_s=dice.choice((5.0, 30.0)),
        requeue_wait_s=dice.choice((10.0, 120.0)),
        min_job_age_s=dice.choice((10.0, 300.0, 300.0)),
        queue_wait_s=dice.choice((2.0, 30.0, 30.0, 600.0, 7200.0)),
        accounting="disabled" if dice.random() < 0.2 else "answered",
        accounting_late_s=dice.choice((1.0, 1.0, 10.0, 60.0)),
        incomplete_is_always_accepted=dice.random() < 0.8,
        accounts_memory=dice.random() < 0.3,
        arrays=dice.random() < 0.2,
    )
    machines = (*site.nodes, *owner.LOGIN_NODES)
    most_s = dice.choice((0.0, 0.0, 0.5, 2.0))
    return Scenario(
        site=site,
        jobs=dice.choice(LAYOUTS),
        pieces=dice.choice((2, 4, 8)),
        piece_s=dice.choice((600.0, 1800.0, 5400.0)),
        limit_s=dice.choice((2 * 3600.0, 6 * 3600.0, 24 * 3600.0)),
        skews_s=tuple((machine, dice.uniform(-most_s, most_s)) for machine in machines),
        fitting_micro_batch=dice.choice((8, 8, 8, 8, 4, 1, 0)),
        needed_mib=dice.choice((2000, 2000, 2000, 2000, 5000, 7500, 20_000)),
        bad_node=dice.choice(("", "", "", "", "n1")),
    )


def _injections(dice: random.Random) -> list[Injection]:
    kinds, weights = list(KINDS), list(KINDS.values())
    # Moments gather where much happens.
    moments = [dice.uniform(0, dice.choice((600.0, 10_000.0, 100_000.0))) for _ in range(2)]
    injections = []
    for _ in range(dice.randint(0, MOST_INJECTIONS)):
        kind = dice.choices(kinds, weights)[0]
        detail = dice.choice(list(attempt.FATES)) if kind == "die" else ""
        seconds = dice.choice((5.0, 60.0, 600.0, 4000.0))
        if dice.random() < 0.6 or kind == "kill":
            role = dice.choice(ROLES)
            most = dice.choice((6, 20, 60))
            injections.append(Injection(kind, None, role, dice.randint(1, most), detail, seconds))
        else:
            moment = dice.choice(moments) + dice.choice((0.0, dice.uniform(0, 30), dice.uniform(0, 3000)))
            injections.append(Injection(kind, moment, "", 0, detail, seconds))
    return injections


def run(history: History, *, tracing: bool = False) -> Result:
    """Let a history happen."""
    world = World(history.scenario, str(history.seed), tracing=tracing)
    watch = invariants.Watch(world)
    counts: Counter[str] = Counter()
    triggers: dict[tuple[str, int], list[Injection]] = {}
    for injection in history.injections:
        if injection.at_s is not None:
            world.kernel.push(injection.at_s, _inject, world, injection, None)
        else:
            triggers.setdefault((injection.role, injection.operation), []).append(injection)

    def on_operation(process: Process, what: str) -> None:
        counts[process.role] += 1
        for injection in triggers.get((process.role, counts[process.role]), ()):
            # Not by the process itself: it may be killed for that.
            world.kernel.push(0.0, _inject, world, injection, process)

    world.kernel.on_operation = on_operation
    owner.give(world, "submit")
    end = "endless"
    try:
        world.kernel.run()
        end = watch.end()
    except Endless as error:
        world.violate("every history ends", str(error))
    finally:
        world.kernel.close()
    return Result(history, world.violations, end, world.kernel.lines)


def _inject(world: World, injection: Injection, process: Process | None) -> None:
    """Let one injection happen; `process` is the one whose operation it was waiting for."""
    kind, slurm = injection.kind, world.slurm
    world.kernel.trace(f"INJECTED {injection}")
    job = _job(world, process)
    if kind in ("controller", "accounting", "full"):
        world.outage(injection.seconds)
    if kind in owner.COMMANDS:
        owner.give(world, kind, machine=injection.operation)
    elif kind == "controller":
        slurm.lose_controller(injection.seconds)
    elif kind == "accounting":
        slurm.accounting_up = False
        world.kernel.push(injection.seconds, setattr, slurm, "accounting_up", True)
    elif kind == "refuse":
        world.sbatch.refuse += 1
    elif kind == "lose answer":
        world.sbatch.lose_answer += 1
    elif kind == "late sbatch":
        world.sbatch.late.append(min(injection.seconds, 60.0))
    elif kind == "lose job":
        world.sbatch.lose_job += 1
    elif kind == "full":
        world.files.full = True
        world.kernel.push(injection.seconds, setattr, world.files, "full", False)
    elif kind == "storm":
        world.fates += [injection.detail or "killed"] * 15
    elif kind == "kill":
        if process is not None:
            _killed(world, process)
    elif job is not None:
        _inject_in_job(world, injection, job)


def _inject_in_job(world: World, injection: Injection, job: Job) -> None:
    kind, slurm = injection.kind, world.slurm
    if kind == "kill batch":
        slurm.batch_killed(job)
    elif kind == "kill step":
        for step in list(job.steps):
            slurm.on_hit(job, "killed")
            _log(world, job)
            step.kill()
    elif kind == "die":
        for step in list(job.steps):
            step.signal(f"DIE {injection.detail}")
    elif kind == "preempt":
        slurm.preempt(job)
    elif kind in ("node", "zombie"):
        slurm.lose_node(job.node, zombie=kind == "zombie", seconds=max(injection.seconds, 60.0))
    elif kind == "requeue by hand" and job.state == "RUNNING":
        slurm.on_hit(job, "by hand")
        slurm.requeue(job.id, incomplete_only=False)


def _killed(world: World, process: Process) -> None:
    if process.role == "batch":
        if process.job is not None and process.job.batch is process:
            world.slurm.batch_killed(process.job)
        return
    if process.role == "attempt":
        world.slurm.on_hit(process.job, "killed")
        _log(world, process.job)
    if process.role == "recovery":
        world.recovery_hit = True
        if process.job is not None:
            world.slurm.batch_killed(process.job)
        return
    process.kill()


def _log(world: World, job: Job) -> None:
    """srun reports that the task of the job's present attempt was killed."""
    for truth in world.truths.values():
        if truth.job is job and truth.start == job.starts and truth.ended is None:
            world.log(truth.stage, job.id).append(f"srun: error: {truth.node}: task 0: Killed")


def _job(world: World, process: Process | None) -> Job | None:
    """The job that something happens to: that of the process, else the one that runs."""
    if process is not None and process.job is not None:
        job: Any = process.job
        return job if job.state == "RUNNING" else None
    return next((job for job in world.slurm.jobs.values() if job.state == "RUNNING"), None)


def shrink(result: Result) -> Result:
    """The same failure with as few injections, and as plain a site, as can be found."""
    names = {violation.invariant for violation in result.violations}

    def still(history: History) -> Result | None:
        again = run(history)
        return again if names & {violation.invariant for violation in again.violations} else None

    best, shrinking = result, True
    while shrinking:
        shrinking = False
        for index in range(len(best.history.injections)):
            kept = best.history.injections[:index] + best.history.injections[index + 1 :]
            if smaller := still(replace(best.history, injections=kept)):
                best, shrinking = smaller, True
                break
    plain = Scenario()
    for name in ("skews_s", "bad_node", "needed_mib", "fitting_micro_batch", "pieces", "piece_s", "limit_s", "jobs"):
        scenario = replace(best.history.scenario, **{name: getattr(plain, name)})
        best = still(replace(best.history, scenario=scenario)) or best
    for name in Site.__dataclass_fields__:
        site = replace(best.history.scenario.site, **{name: getattr(plain.site, name)})
        best = still(replace(best.history, scenario=replace(best.history.scenario, site=site))) or best
    return run(best.history, tracing=True)


def since_begin(world: World) -> float:
    return world.kernel.now - BEGIN
