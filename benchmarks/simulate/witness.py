"""What can be seen of the end of an attempt, as evidence for the diagnosis: never the truth itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftlib.runs.act import Investigate
from ftlib.runs.events import Settled, Settler
from ftlib.runs.ledger import Ledger

if TYPE_CHECKING:
    from benchmarks.simulate.world import Truth, World

ACCOUNTED = {
    "NODE_FAIL": "node failure", "PREEMPTED": "preemption", "TIMEOUT": "time limit", "CANCELLED": "cancelled",
    "OUT_OF_MEMORY": "host memory",
}  # fmt: skip
SHOWN = (
    ("oom_kill", "host memory"), ("CUDA out of memory", "GPU memory"), ("Watchdog", "collective"),
    ("ValueError", "code"), ("FATAL", "container"), ("Errno 116", "transient"), ("Killed", "killed"),
    ("Errno 28", "disk full"),
)  # fmt: skip


def investigator(world: World, here: Truth | None = None, *, code: int | None = None) -> Investigate:
    """Finds out why attempts ended. code: srun's, where the epilogue of the attempt `here` asks."""

    def investigate(ledger: Ledger, stage: str, attempt: int, by: Settler) -> Settled:
        truth = world.truths[stage, attempt]
        cause = _stand_in(world, ledger, truth, epilogue=truth is here and by == "epilogue")
        return Settled(
            stage=stage, attempt=attempt, job_id=truth.job.id, cause=cause, by=by, message=cause, node=truth.node,
            code=code,
        )  # fmt: skip

    return investigate


def _stand_in(world: World, ledger: Ledger, truth: Truth, *, epilogue: bool) -> str:
    slurm, job = world.slurm, truth.job
    world.kernel.operation("sacct", 0.3)
    if epilogue and ledger.cancelled(truth.stage, job.id):
        return "cancelled"
    state = ""
    if slurm.accounting_up and slurm.site.accounting == "answered":
        rows = slurm.accounted(job.id)
        state = rows[truth.start - 1].state if len(rows) >= truth.start and rows[truth.start - 1].ended else ""
    if state == "CANCELLED":
        return "cancelled"
    outcome = world.files.outcomes.get((truth.stage, truth.number))
    if outcome is not None and outcome.code == 64:
        return "disk full" if "No space" in outcome.message else "input"
    if outcome is not None and outcome.code == 76:
        return "bad GPU"
    if outcome is not None and "(idle GPU)" in outcome.message:
        return "idle GPU"
    if state in ACCOUNTED:
        return ACCOUNTED[state]
    if outcome is not None and outcome.code == 75:
        if epilogue and slurm.up and job.preempted:
            return "preemption"
        near = "time limit" in outcome.message and epilogue and job.ends - world.kernel.now < slurm.site.warning_s
        return "time limit" if near else "unknown"
    text = "\n".join(truth.log)
    return next((cause for word, cause in SHOWN if word in text), "unknown")
