"""What can be seen of the end of an attempt, as evidence for the real diagnosis: never the truth itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftlib.runs.act import Investigate
from ftlib.runs.diagnosis import Accounted, Controller, Evidence, cause_of
from ftlib.runs.events import Cancelled, Settled, Settler
from ftlib.runs.ledger import Ledger
from ftlib.slurm import evidence

if TYPE_CHECKING:
    from benchmarks.simulate.slurm import Job
    from benchmarks.simulate.world import Truth, World

ASK_S = 0.3


def investigator(world: World, here: Truth | None = None, *, code: int | None = None) -> Investigate:
    """Finds out why attempts ended, as `ftlib.slurm.investigate` does.

    here: the attempt whose epilogue asks. code: srun's exit code of it.
    """

    def investigate(ledger: Ledger, stage: str, attempt: int, by: Settler) -> Settled:
        truth = world.truths[stage, attempt]
        own = by == "epilogue" and truth is here
        seen = _gather(world, ledger, truth, code=code if own else None, epilogue=own)
        finding = cause_of(seen)
        world.kernel.trace(f"found out: {stage}-{attempt} ended by {finding.cause} ({finding.message})")
        return Settled(
            stage=stage, attempt=attempt, job_id=truth.job.id, cause=finding.cause, by=by, message=finding.message,
            line=finding.line, node=ledger.attempt(stage, attempt).node, code=code if own else None,
        )  # fmt: skip

    return investigate


def _gather(world: World, ledger: Ledger, truth: Truth, *, code: int | None, epilogue: bool) -> Evidence:
    """As `ftlib.slurm.evidence.gather`."""
    scenario, stage, job = world.scenario, truth.stage, truth.job
    attempt = ledger.attempt(stage, truth.number)
    outcome = ledger.outcome(stage, truth.number)
    accounted = _accounted(world, job, attempt.began)
    controller = _controller(world, job)
    clock = world.kernel.now + scenario.skew_s(world.kernel.me.machine)
    cancelled = (event.time for event in ledger.of(Cancelled, stage) if event.job_id == job.id)
    shared = epilogue and len(job.stages) > 1
    return Evidence(
        epilogue=epilogue,
        exit_code=code,
        outcome_code=outcome.code if outcome else None,
        outcome_message=outcome.message if outcome else "",
        logs={0: _log(world, truth)},
        ranks=1,
        accounted=accounted,
        controller=controller,
        restarts=truth.start - 1 if epilogue else None,
        cancelled_at=next(cancelled, None),
        warning_s=scenario.site.warning_s,
        began=attempt.began or None,
        ended=clock if epilogue else accounted.ended if accounted else None,
        planned_end=job.rows[truth.start - 1].start + job.limit_s if shared else attempt.began + scenario.limit_s,
    )


def _log(world: World, truth: Truth) -> str:
    """What the log holds from the attempt's beginning to that of the next one in the same job."""
    after = world.truths.get((truth.stage, truth.number + 1))
    end = after.log_begin if after is not None and after.job is truth.job else None
    return evidence.until_restart("\n".join(world.log(truth.stage, truth.job.id)[truth.log_begin : end]))


def _accounted(world: World, job: Job, began: float) -> Accounted | None:
    """What the real reader makes of sacct's answer."""
    slurm = world.slurm
    world.kernel.operation("sacct", ASK_S)
    if not slurm.accounting_up or slurm.site.accounting != "answered":
        return None
    lines = []
    for row in slurm.accounted(job.id):
        ended = "Unknown" if row.ended is None else f"{row.ended:.0f}"
        lines.append(f"{job.id}|{row.state}|0:{row.shell_signal}|{int(row.start)}|{ended}")
    return evidence.accounted_in("\n".join(lines), began)


def _controller(world: World, job: Job) -> Controller | None:
    """What the real reader makes of `scontrol show job`."""
    slurm = world.slurm
    world.kernel.operation("scontrol show job", ASK_S)
    if not slurm.up or slurm.known(job.id) is None:
        return None
    row = job.rows[-1] if job.rows else None
    waits = job.state == "PENDING" or row is None
    started, ended = (row.start, row.ended or job.ends) if row else (0.0, 0.0)
    if job.cancelled_waiting:  # Slurm says then that it began when it ended
        started = ended = job.ended
    fields = {
        "JobState": job.shown,
        "Reason": "TimeLimit" if job.state == "TIMEOUT" else "None",
        "StartTime": "Unknown" if waits else f"{int(started)}",
        "EndTime": "Unknown" if waits else f"{int(ended)}",
        "PreemptTime": "None" if job.preempted is None else f"{int(job.preempted)}",
        "Restarts": f"{job.restarts}",
        "ExitCode": f"0:{row.shell_signal if row else 0}",
    }
    return evidence.controller_in(fields)
