"""The batch script of a job, as `slurm_templates/prologue.sh` and `epilogue.sh` make it; the recovery job's program."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.simulate import attempt, witness
from benchmarks.simulate.kernel import Process
from benchmarks.simulate.slurm import RECOVERY_LIMIT_S, Job
from ftlib.errors import FtError
from ftlib.runs import act, overrides
from ftlib.runs.decide import EXIT_CANCELLED, EXIT_INTERRUPTED, Action, Nothing, Requeue, Stop
from ftlib.runs.ledger import RECOVERY
from ftlib.runs.scheduler import Here

if TYPE_CHECKING:
    from benchmarks.simulate.world import Truth, World

# How long a shell waits for Slurm to end it after a requeue.
AFTER_REQUEUE_S = 300.0


def script(world: World, job: Job) -> int:
    """What a job does; its exit code."""
    if job.stages == (RECOVERY,):
        return recovery(world, job)
    for stage in job.stages:
        if world.files.done(stage):
            continue
        code = _stage(world, job, stage)
        if code != 0:
            return code
    return 0


def _stage(world: World, job: Job, stage: str) -> int:
    """One attempt of a stage, from its prologue to its epilogue; 0 where it is done and the next may follow."""
    from benchmarks.simulate.world import Truth

    kernel, files = world.kernel, world.files
    node, start = kernel.me.machine, job.starts
    log_begin = len(world.log(stage, job.id))
    world.log(stage, job.id).append(f"ftlib: start {start} of job {job.id}, on {node}")
    here = Here(
        job_id=job.id, stage=stage, attempt=0, ended=False, may_requeue=world.scenario.site.may_requeue,
        mem_mib=job.mem_mib,
    )  # fmt: skip
    began = False
    while not began:
        kernel.operation("count attempts", 0.02)
        here = replace(here, attempt=len(files.attempts.get(stage, ())) + 1)
        name, ask = f"prologue {stage}-{here.attempt}", partial(_begin, world, here)
        # Without an answer it asks once more, then it begins.
        answer = _child(world, job, "prologue", name, ask) or _child(world, job, "prologue", name, ask)
        if answer.startswith("exit"):
            return int(answer.split()[1])
        try:
            # Another may have taken that number meanwhile.
            clock = kernel.now + world.scenario.skew_s(node)
            began = files.begin_attempt(stage, here.attempt, job.id, node, clock)
        except OSError:
            return 1
    number = here.attempt
    truth = Truth(stage, number, job, start, node, kernel.now, log_begin=log_begin)
    truth.causes.update(cause for hit, cause in job.hits if hit == start)
    world.truths[stage, number] = truth
    for earlier in range(1, number):
        attempt.supersede(world, world.truths[stage, earlier])
    world.on_srun(truth)
    truth.srun_began = kernel.now
    step = kernel.spawn(f"attempt {stage}-{number}", "attempt", node, lambda: attempt.run(world, truth), job=job)
    truth.process = step
    if kernel.me.lost:
        step.lost = True
    else:
        job.steps.append(step)
    kernel.wait_for(step)
    truth.ended = kernel.now
    if step in job.steps:
        job.steps.remove(step)
    code = attempt.exit_code(truth)
    truth.exit_code = code
    return _epilogue(world, job, here, truth, code)


def _epilogue(world: World, job: Job, here: Here, truth: Truth, code: int) -> int:
    kernel, files = world.kernel, world.files
    kernel.operation("epilogue looks for a later attempt", 0.05)
    if len(files.attempts[here.stage]) > here.attempt:
        return EXIT_INTERRUPTED
    outcome = files.outcomes.get((here.stage, here.attempt))
    if outcome is not None:
        code = outcome.code
        if code == 0:
            return 0
    elif code == 0:
        code = 1
    ended = replace(here, ended=True)
    answer = _child(
        world, job, "epilogue", f"epilogue {here.stage}-{here.attempt}", lambda: _end(world, ended, truth, code)
    )
    if answer == "requeued":
        kernel.pause(AFTER_REQUEUE_S)
        return EXIT_INTERRUPTED
    # Without an answer nothing could be recorded: the recovery job tries again.
    return int(answer.split()[1]) if answer else code


def _child(world: World, job: Job, role: str, name: str, body: object) -> str:
    """A program that the batch script runs and waits for; what it prints, nothing where it fails."""
    kernel = world.kernel
    child: Process = kernel.spawn(name, role, kernel.me.machine, body, job=job)  # type: ignore[arg-type]
    child.lost = kernel.me.lost
    if not child.lost:
        job.children.append(child)
    kernel.wait_for(child)
    if child in job.children:
        job.children.remove(child)
    return child.result or ""


def _begin(world: World, here: Here) -> str:
    store = world.store()
    action = act.begin_attempt(
        store, world.controller(), here, witness.investigator(world), clock=store.clock
    )  # fmt: skip
    if isinstance(action, Stop):
        return f"exit {action.code}"
    if isinstance(action, Nothing) and action.superseded:
        return f"exit {EXIT_INTERRUPTED}"
    return "begin"


def _end(world: World, here: Here, truth: Truth, code: int) -> str:
    store, controller = world.store(), world.controller()
    investigate = witness.investigator(world, truth, code=code)
    action = act.end_attempt(store, controller, here, investigate, clock=store.clock)
    if isinstance(action, Requeue):
        changes = _changes(world, action)
        how = act.requeue(
            controller, here.job_id, changes, report=world.kernel.trace, sleep=world.sleep, restarts=truth.start - 1
        )  # fmt: skip
        if how == act.REQUEUED:
            return "requeued"
        return f"exit {EXIT_CANCELLED if how == 'CANCELLED' else EXIT_INTERRUPTED}"
    if isinstance(action, Stop):
        return f"exit {action.code}"
    return f"exit {EXIT_INTERRUPTED}"


def _changes(world: World, action: Action) -> dict[str, str]:
    """As `ftlib.slurm.attempt.changes_of`."""
    now = overrides.fold(world.store().ledger().events, world.store().clock())
    changes = {}
    if isinstance(action, Requeue) and action.backoff_s:
        changes["StartTime"] = f"now+{action.backoff_s}"
    if any(change.field.startswith(overrides.EXCLUDE) for change in action.changes):
        changes["ExcNodeList"] = ",".join(now.excluded)
    if any(change.field.startswith(overrides.MEMORY) for change in action.changes):
        changes["MinMemoryNode"] = str(now.memory_mib[action.stage])
    return changes


def recovery(world: World, job: Job) -> int:
    """The recovery job: it acts, and tries again while Slurm or another process keeps it from that."""
    world.kernel.me.role = "recovery"
    store = world.store()
    began, wait_s = world.kernel.now, 1.0
    while True:
        try:
            act.recover(
                store, world.scheduler(), world.scenario.jobs, witness.investigator(world), clock=store.clock
            )  # fmt: skip
        except (FtError, OSError) as error:
            world.kernel.trace(f"recovery: {error}")
            if world.kernel.now - began > RECOVERY_LIMIT_S:
                world.recovery_hit = world.recovery_hit or world.outage_since(began)
                return 1
            world.sleep(wait_s)
            wait_s = min(2 * wait_s, 60.0)
        else:
            return 0
