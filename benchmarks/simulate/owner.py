"""What the run's owner does at a login node: submit, resume, make cancel, a plain scancel, status."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.simulate import witness
from benchmarks.simulate.kernel import Process
from ftlib.errors import FtError
from ftlib.runs import act, comments, decide
from ftlib.runs.decide import Nothing
from ftlib.runs.ledger import RECOVERY, jobs_of
from ftlib.runs.scheduler import Job

if TYPE_CHECKING:
    from benchmarks.simulate.world import World

LOGIN_NODES = ("login1", "login2")
# The owner gives a command again after so long where it failed, so often.
AGAIN_S = 600.0
TRIES = 4


def submit(world: World) -> str:
    """`make submit` of settings whose run may exist already."""
    store, scheduler = world.store(), world.scheduler()
    ledger = store.ledger()
    if ledger.submissions:
        view = scheduler.look(jobs_of([ledger]))
        action = decide.next_action(decide.with_unknown_ends(ledger, view), view, store.clock())
        if isinstance(action, Nothing) and action.over and action.cause == "cancelled":
            return "it was cancelled"
    return resume(world)


def resume(world: World) -> str:
    """`make resume`."""
    world.cancelled_at = None
    store = world.store()
    action = act.resume(
        store, world.scheduler(), world.scenario.jobs, witness.investigator(world), user="owner", clock=store.clock
    )  # fmt: skip
    if isinstance(action, Nothing) and action.cause == "cancelled":
        raise FtError("it was cancelled and is still ending")
    return action.message


def cancel(world: World) -> str:
    """`make cancel`."""
    stages = act.cancel(world.store(), world.scheduler(), user="owner")
    if not stages:
        return "nothing is queued or running"
    others = [process for process in world.kernel.processes if process.alive and process.role in ("submit", "resume")]
    if not others:  # in another shell
        world.cancelled_at = world.kernel.now
    return "cancelled"


def scancel(world: World) -> str:
    """A plain scancel of the job that a person sees in squeue: the run's first one."""
    scheduler = world.scheduler()
    jobs = [job for job in scheduler.queue() if job.state in ("PENDING", "RUNNING") and not _recovers(job)]
    if not jobs:
        return "nothing is queued or running"
    scheduler.cancel([jobs[0].id])
    return f"scancelled {jobs[0].id}"


def _recovers(job: Job) -> bool:
    comment = comments.parse(job.comment)
    return comment is not None and comment.stages == (RECOVERY,)


def status(world: World) -> str:
    """`make status`, which settles nothing."""
    ledger = world.store().ledger()
    view = world.scheduler().see(jobs_of([ledger]))
    return decide.next_action(ledger, view, world.store().clock()).message


COMMANDS: dict[str, Callable[[World], str]] = {
    "submit": submit, "resume": resume, "cancel": cancel, "scancel": scancel, "status": status,
}  # fmt: skip


def give(world: World, command: str, *, machine: int = 0, tries: int = TRIES) -> None:
    """Let the owner give a command, and give it again where it fails or is killed."""

    def body() -> str:
        try:
            answer = COMMANDS[command](world)
        except (FtError, OSError) as error:
            world.kernel.trace(f"{command}: {type(error).__name__}: {error}")
            return ""
        world.kernel.trace(f"{command}: {answer}")
        return answer

    world.cancel_given = world.cancel_given or command in ("cancel", "scancel")
    process = world.kernel.spawn(command, command, LOGIN_NODES[machine % 2], body)
    if command in ("submit", "resume"):
        world.owner_satisfied = False
    world.kernel.push(AGAIN_S, _look_again, world, command, process, machine, tries - 1)


def _look_again(world: World, command: str, process: Process, machine: int, tries: int) -> None:
    if process.alive:
        world.kernel.push(AGAIN_S, _look_again, world, command, process, machine, tries)
    elif process.result:
        world.owner_satisfied = world.owner_satisfied or command in ("submit", "resume")
    elif tries > 0 and not (command in ("submit", "resume") and world.cancelled_at is not None):
        give(world, command, machine=machine, tries=tries)
