"""The ways to end a life: what a site, a person or bad luck does. Each is done to a life that stands at its place."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from benchmarks.chaos import processes, slurm
from benchmarks.chaos.places import View
from ftlib.runs.diagnosis import Cause


def job_of(view: View) -> str:
    """The job of this life."""
    return view.run.ledger().attempt(view.stage, view.life).job_id


def _gone(view: View) -> None:
    """The life's processes are no more, or its job has left the running state."""
    job = job_of(view)
    slurm.until(
        lambda: not processes.workers(view.run.path, view.stage, view.life) and slurm.state(job) != "RUNNING",
        90, f"the end of {view.stage}, life {view.life}",
    )  # fmt: skip


def preempted(view: View, _: Random) -> None:
    """A job with a higher claim takes the node; the tasks are warned and have the grace to save."""
    slurm.preempt(view.workers[-1].node)


def preempted_at_once(view: View, _: Random) -> None:
    """The same with GraceTime 0."""
    slurm.set_grace(0)
    slurm.preempt(view.workers[-1].node)
    _gone(view)
    slurm.set_grace(slurm.GRACE_S)


def time_limit(view: View, _: Random) -> None:
    """The limit is moved near, so that Slurm sends the warning; set back for the next life."""
    job = job_of(view)
    known = slurm.job(job)
    hours, minutes, seconds = (int(word) for word in known["RunTime"].split(":"))
    near = math.floor((hours * 3600 + minutes * 60 + seconds) / 60) + 2
    slurm.say("scontrol", "update", f"JobId={job}", f"TimeLimit={near}")
    pid = view.pid

    def warned() -> bool:
        return processes.pending(pid, signal.SIGUSR2) or not os.path.exists(f"/proc/{pid}")

    slurm.until(warned, 100, "the warning before the time limit")
    processes.thaw(view.workers)
    _gone(view)
    slurm.say("scontrol", "update", f"JobId={job}", f"TimeLimit={known['TimeLimit']}")


def requeued(view: View, _: Random) -> None:
    """`scontrol requeue`."""
    slurm.say("scontrol", "requeue", job_of(view))


def signalled(view: View, random: Random) -> None:
    """SIGUSR2 by hand: to the step, or with several ranks to one of them alone."""
    if len(view.workers) > 1 and random.random() < 0.5:
        processes.signal_to(random.choice(view.workers).pid, signal.SIGUSR2)
    else:
        slurm.say("scancel", "-s", "USR2", processes.step_of(view.workers[0]))
    processes.thaw(view.workers)


def worker_killed(view: View, random: Random) -> None:
    """SIGKILL to one rank."""
    processes.kill(random.choice(view.workers).pid)
    processes.thaw(view.workers)


def step_killed(view: View, random: Random) -> None:
    """SIGKILL to srun, or to the slurmstepd of one node."""
    job = job_of(view)
    daemons = processes.step_daemons(job)
    for pid in processes.sruns(job) if random.random() < 0.5 or not daemons else [random.choice(daemons)]:
        processes.kill(pid)
    processes.thaw(view.workers)


def shell_killed(view: View, _: Random) -> None:
    """SIGKILL to the batch shell: no epilogue runs, and Slurm does not requeue."""
    shell = processes.batch_shell(job_of(view))
    if shell is None:
        raise slurm.Trouble(f"no batch shell of job {job_of(view)}")
    processes.kill(shell)
    processes.thaw(view.workers)


def node_down(view: View, random: Random) -> None:
    """One of the job's nodes is set down, in half the cases after a power cut that ends all its processes there at
    once; it comes back when the job has left it."""
    job, node = job_of(view), random.choice(view.workers).node
    if random.random() < 0.5:
        for pid in processes.on_node(job, node):
            processes.kill(pid)
    slurm.say("scontrol", "update", f"NodeName={node}", "State=down", "Reason=chaos")
    processes.thaw(view.workers)
    _gone(view)
    time.sleep(1)
    slurm.heal()


def controller_restarted(view: View, _: Random) -> None:
    """slurmctld is killed, the run is told to save, and the controller comes back some seconds later."""
    slurm.kill_controller(knows_since=view.began())
    for worker in view.workers:
        processes.signal_to(worker.pid, signal.SIGUSR2)
    processes.thaw(view.workers)
    time.sleep(8)
    slurm.start_controller()


@dataclass(frozen=True)
class Kind:
    """A way to end a life."""

    name: str
    do: Callable[[View, Random], None]
    cause: Cause  # what `why` must name
    warned: bool  # the tasks are told, and have the time to save


KINDS = {
    kind.name: kind
    for kind in (
        Kind("preemption with grace", preempted, "preemption", True),
        Kind("preemption, GraceTime 0", preempted_at_once, "preemption", False),
        Kind("time limit", time_limit, "time limit", True),
        Kind("scontrol requeue", requeued, "by hand", False),
        Kind("USR2 by hand", signalled, "by hand", True),
        Kind("SIGKILL of a worker", worker_killed, "killed", False),
        Kind("SIGKILL of the step", step_killed, "killed", False),
        Kind("SIGKILL of the batch shell", shell_killed, "killed", False),
        Kind("node down", node_down, "node failure", False),
        Kind("controller restarted", controller_restarted, "by hand", True),
    )
}


def next_life_begun(view: View) -> bool:
    """Whether the stage has a life after this one, or ended well in spite of the kill."""
    return (view.run.lives / f"{view.stage}-{view.life + 1}").exists() or view.run.stage_done(view.stage)
