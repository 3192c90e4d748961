"""Ends of attempts with all the evidence that a real Slurm leaves of them, for tests that then take some of it away.

The logs are real ones (tests/logs); what accounting and the controller say beside them was read on the local Slurm,
22.05.8, with the same state, times and restarts as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.runs.diagnosis import Accounted, Cause, Controller, Evidence

LOGS = Path(__file__).parent / "logs"
BEGAN, ENDED, WARNING_S = 1_700_000_000.0, 1_700_001_000.0, 90.0
NEAR, FAR = ENDED + 100, ENDED + 3_000
TERM, USR2 = "interrupted (preemption), saved at step 3", "interrupted (time limit), saved at step 3"


def log(name: str) -> str:
    """A real log."""
    return (LOGS / f"{name}.log").read_text(encoding="utf-8")


@dataclass(frozen=True)
class World:
    """What happened to an attempt, and all the evidence of it."""

    name: str
    truths: tuple[Cause, ...]  # what it may be called: two where the owner cancelled what was ending anyway
    evidence: Evidence
    certain: bool = True  # the whole evidence suffices to tell


def running(**changes: Any) -> Controller:
    """A job that Slurm has not taken back, far from its time limit."""
    return Controller(**{"state": "RUNNING", "started": BEGAN, "ends": FAR, "restarts": 0, **changes})


# Slurm has requeued the job: the controller speaks of the attempt to come.
REQUEUED = Controller(state="COMPLETING", restarts=1)
PENDING = Controller(state="PENDING", reason="BeginTime", started=ENDED + 8, ends=ENDED + 600, restarts=1)
# The job was ended for good, and its processes are not gone yet.
ENDING = Controller(state="COMPLETING", reason="None", started=BEGAN, ends=ENDED, restarts=0)


def world(
    name: str, *truths: Cause, logs: Mapping[int, str] | str = "", state: str = "RUNNING", certain: bool = True,
    **known: Any,
) -> World:  # fmt: skip
    """A world as its epilogue finds it, with one rank far from its time limit, unless `known` says otherwise."""
    by_rank = {0: logs} if isinstance(logs, str) else dict(logs)
    over = state != "RUNNING"
    accounted = Accounted(state=state, ended=ENDED if over else None, shell_signal=known.pop("shell_signal", 0))
    full: dict[str, Any] = {
        "epilogue": True, "exit_code": 1, "logs": by_rank, "ranks": len(by_rank), "accounted": accounted,
        "controller": running(), "restarts": 0, "warning_s": WARNING_S, "began": BEGAN, "ended": ENDED,
        "planned_end": FAR, **known,
    }  # fmt: skip
    return World(name, truths, Evidence(**full), certain)


def later(name: str, *truths: Cause, **known: Any) -> World:
    """A world as the next attempt's prologue or the recovery job finds it."""
    return world(name, *truths, **{"epilogue": False, "exit_code": None, "restarts": None, **known})


def saved(message: str) -> dict[str, Any]:
    """The outcome of an attempt that was told to stop, and saved."""
    return {"outcome_code": 75, "outcome_message": message, "exit_code": 75}


# Without the last line, which the slurmstepd of the attempt before it wrote.
HEALTHY = log("healthy").rpartition("slurmstepd-n1")[0]
CLOSED = log("gloo-closed").splitlines()[0] + "\n"
EXITED = "srun: error: n1: task 0: Exited with exit code 1\n"
ENDED_RANK_1 = "srun: error: n2: task 1: Exited with exit code 1\n"
TRACEBACK = "Traceback (most recent call last):\n  File \"x.py\", line 1, in <module>\nKeyError: 'prompt'\n"
BY_REQUEST = f"{HEALTHY}{USR2}\nsrun: error: n1: task 0: Exited with exit code 75\n"
TOLD = f"{HEALTHY}{TERM}\nsrun: error: n1: task 0: Exited with exit code 75\n"
WARNED = "srun: error: n1: task 0: User defined signal 2\n"
TERMINATED = "srun: error: n1: task 0: Terminated\n"

WORLDS = [
    # Taken back by Slurm.
    world("preempted, saved", "preemption", logs=log("preempted-saved"), controller=running(preempted=ENDED - 1),
          **saved(TERM)),
    world("preempted before the handlers stood", "preemption", logs=TERMINATED, exit_code=143,
          controller=running(preempted=ENDED - 1)),
    world("preempted, two ranks, one killed by the warning", "preemption", ranks=2, exit_code=143,
          logs={0: f"srun: error: n2: task 1: Terminated\n{CLOSED}{EXITED}", 1: ""},
          controller=running(preempted=ENDED - 1)),
    world("preempted with the warning SIGUSR2", "preemption", logs=BY_REQUEST, **saved(USR2),
          controller=running(preempted=ENDED - 1)),
    later("preempted without grace", "preemption", logs=log("preempted"), state="PREEMPTED", controller=PENDING),
    world("node down, the batch host's tasks saved", "node failure", logs=log("node-down"), state="NODE_FAIL",
          controller=PENDING, **saved(TERM)),
    world("second node lost", "node failure", logs={0: f"{CLOSED}srun: error: Node failure on n2\n{EXITED}", 1: ""},
          state="NODE_FAIL", controller=PENDING),
    later("node lost with all on it", "node failure", logs=HEALTHY, state="NODE_FAIL", controller=PENDING),
    later("node lost as it saved", "node failure", logs=HEALTHY, state="NODE_FAIL", outcome_code=75,
          outcome_message=TERM, controller=PENDING),
    # The time limit.
    world("time limit, saved", "time limit", logs=BY_REQUEST, controller=running(ends=NEAR), planned_end=NEAR,
          **saved(USR2)),
    world("time limit that was moved near, saved", "time limit", logs=BY_REQUEST, controller=running(ends=NEAR),
          **saved(USR2)),
    world("time limit before the handlers stood", "time limit", logs=WARNED, exit_code=140, planned_end=NEAR,
          controller=running(ends=NEAR)),
    later("time limit outstayed", "time limit", logs=log("limit-outstayed"), state="TIMEOUT", planned_end=ENDED,
          controller=Controller(state="TIMEOUT", reason="TimeLimit", started=BEGAN, ends=ENDED, restarts=0)),
    world("time limit outstayed, its epilogue asks", "time limit", logs=log("limit-outstayed"), state="TIMEOUT",
          planned_end=ENDED, exit_code=0, controller=Controller(state="COMPLETING", reason="TimeLimit", started=BEGAN,
                                                                ends=ENDED, restarts=0)),
    # By hand.
    world("SIGUSR2 by hand", "by hand", logs=BY_REQUEST, **saved(USR2)),
    world("SIGTERM by hand", "by hand", logs=TOLD, **saved(TERM)),
    world("scontrol requeue, saved", "by hand", logs=log("requeued"), state="REQUEUED", controller=REQUEUED,
          **saved(TERM)),
    world("scontrol requeue, saved, on 26.05", "by hand", logs=log("requeued-26"), state="REQUEUED",
          controller=PENDING, **saved(TERM)),
    later("scontrol requeue, the epilogue was too slow", "by hand", logs=log("requeued"), state="REQUEUED",
          controller=PENDING, outcome_code=75, outcome_message=TERM),
    # Cancelled.
    world("scancel, saved", "cancelled", logs=log("scancel"), state="CANCELLED by 0", controller=ENDING, **saved(TERM)),
    world("scancel, outstayed", "cancelled", logs=log("scancel-outstayed"), state="CANCELLED by 0", controller=ENDING,
          exit_code=0),
    world("scancel on 26.05", "cancelled", logs=log("scancel-26"), state="CANCELLED by 0", controller=ENDING,
          **saved(TERM)),
    world("scancel, two ranks", "cancelled", logs={0: log("scancel-two-ranks"), 1: "saved\n"}, controller=ENDING,
          state="CANCELLED by 0", **saved(TERM)),
    later("scancel, its epilogue was killed", "cancelled", logs=log("scancel"), state="CANCELLED by 0",
          outcome_code=75, outcome_message=TERM, shell_signal=9,
          controller=Controller(state="CANCELLED", started=BEGAN, ends=ENDED, restarts=0)),
    world("make cancel", "cancelled", logs=log("scancel"), state="CANCELLED by 0", controller=ENDING,
          cancelled_at=ENDED - 3, **saved(TERM)),
    world("scancel in the epilogue of one that was told to save", "cancelled", "by hand", logs=BY_REQUEST,
          state="CANCELLED by 0", controller=ENDING, **saved(USR2)),
    world("scancel in the epilogue of a failure", "cancelled", "GPU memory", logs=log("gpu-oom"),
          state="CANCELLED by 0", controller=ENDING),
    world("make cancel right after a time-out", "cancelled", "time limit", logs=BY_REQUEST, state="TIMEOUT",
          controller=ENDING, planned_end=NEAR, cancelled_at=ENDED - 1, **saved(USR2)),
    later("make cancel of the requeued job of a lost node", "node failure", logs=HEALTHY, state="NODE_FAIL",
          cancelled_at=ENDED + 60, controller=Controller(state="CANCELLED", started=ENDED + 60, ends=ENDED + 60)),
    # Killed.
    world("worker killed", "killed", logs=log("worker-killed"), exit_code=137),
    world("second rank killed", "killed", logs={0: log("rank-killed"), 1: HEALTHY}, exit_code=137),
    world("second rank killed, the first saved", "killed", logs={0: log("rank-killed-saved"), 1: HEALTHY},
          **saved(TERM)),
    world("slurmstepd killed", "killed", logs=log("stepd-killed"), **saved(TERM)),
    world("slurmstepd of the second node killed", "killed", logs={0: log("stepd-killed-beyond"), 1: ""},
          exit_code=137, certain=False),
    world("slurmstepd of the second node killed, connections reset", "killed", ranks=2, certain=False,
          logs={0: log("gloo-reset")}),
    world("srun killed", "killed", logs=log("srun-killed"), exit_code=137),
    later("batch shell killed, saved", "killed", logs=log("shell-killed"), state="FAILED", shell_signal=9,
          outcome_code=75, outcome_message=TERM,
          controller=Controller(state="FAILED", started=BEGAN, ends=ENDED, restarts=0, shell_signal=9)),
    # Its own doing.
    world("host memory", "host memory", logs=log("host-oom"), exit_code=137),
    world("host memory, ended by accounting", "host memory", "cancelled", state="CANCELLED by 0", controller=ENDING,
          logs="slurmstepd: error: StepId=7.0 exceeded memory limit (5000 > 4000), being killed\n" + log("scancel")),
    world("host memory of the second rank", "host memory", exit_code=137,
          logs={0: f"{log('host-oom')}srun: error: n2: task 1: Out Of Memory\n{CLOSED}", 1: HEALTHY}),
    world("GPU memory", "GPU memory", logs=log("gpu-oom"), outcome_code=1,
          outcome_message="OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    world("GPU memory of the second rank", "GPU memory", logs={0: CLOSED + ENDED_RANK_1 + EXITED, 1: log("gpu-oom")},
          outcome_code=1, outcome_message="RuntimeError: a backend that we do not know went away"),
    world("GPU memory of the second rank, which is slow to end", "GPU memory",
          logs={0: CLOSED + EXITED + ENDED_RANK_1, 1: log("gpu-oom")}),
    world("bad GPU", "bad GPU", logs={0: CLOSED, 1: log("ecc")}, outcome_code=76,
          outcome_message="uncorrectable ECC error (rank 1 on n2)"),
    world("collective", "collective", logs={0: log("nccl-watchdog"), 1: log("nccl-watchdog")}, exit_code=134),
    world("a rank cannot be reached, and srun ends it", "collective",
          logs={0: log("rank-missing") + EXITED + "srun: error: n2: task 1: Killed\n", 1: HEALTHY}),
    world("code", "code", logs=TRACEBACK + EXITED, outcome_code=1, outcome_message="KeyError: 'prompt'"),
    world("code, of an error that has no signature", "code", logs=EXITED, outcome_code=1,
          outcome_message="FtError: training diverged at step 3"),
    world("code of the second rank", "code", logs={0: CLOSED + ENDED_RANK_1 + EXITED, 1: TRACEBACK}, outcome_code=1,
          outcome_message=CLOSED.strip()),
    world("code before there could be an outcome", "code", logs=log("import-error")),
    world("disk full", "disk full", logs=log("disk-full"), outcome_code=64, outcome_message="no space left at /blue"),
    world("input", "input", logs="", outcome_code=64, outcome_message="train.jsonl, line 3: no field 'prompt'"),
    world("transient", "transient", logs=log("stale-nfs")),
    world("idle GPU", "idle GPU", logs="", **saved("interrupted (idle GPU), saved at step 12")),
    # Nobody can tell.
    world("killed without a trace", "killed", logs=HEALTHY, exit_code=137, certain=False),
    later("the batch shell left, and nobody knows why", "transient", logs=HEALTHY, state="FAILED",
          certain=False),
]  # fmt: skip
