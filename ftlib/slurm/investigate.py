"""Why an attempt ended, as an event to be recorded: the evidence gathered, and judged by the one diagnosis.
Standard library only: it runs on the batch host."""

from __future__ import annotations

import os
from pathlib import Path

from ftlib.errors import Unavailable
from ftlib.runs.act import Investigate
from ftlib.runs.diagnosis import cause_of
from ftlib.runs.events import Settled, Settler
from ftlib.runs.ledger import Ledger
from ftlib.runs.policy import KINDS
from ftlib.slurm import client
from ftlib.slurm.evidence import gather


def investigator(
    run: Path, *, code: int | None = None, logs: Path | None = None, job_id: str = "", slurm: bool = True
) -> Investigate:
    """What finds out why attempts of the run folder `run` ended.

    Of an epilogue's own attempt: `code`, srun's exit code; `logs`, the folder of its logs; `job_id`, by which they are
    named. slurm: Slurm can be asked; False for a run in the foreground.
    """

    def investigate(ledger: Ledger, stage: str, attempt: int, by: Settler) -> Settled:
        # The epilogue may also find earlier attempts of which nobody has recorded the end.
        own = by == "epilogue" and attempt == ledger.attempt_count(stage)
        evidence = gather(
            run, ledger, stage, attempt, exit_code=code if own else None, epilogue=own, slurm=slurm,
            job_id=job_id if own else "", log_folder=logs if own else None,
        )  # fmt: skip
        finding = cause_of(evidence)
        rank = finding.rank or 0
        # Of a job that is gone only the first rank's node is known.
        first_node = "" if rank else ledger.attempt(stage, attempt).node
        plain = KINDS[finding.cause].plain
        return Settled(
            stage=stage,
            attempt=attempt,
            job_id=job_id if own and job_id else ledger.attempt(stage, attempt).job_id,
            cause=finding.cause,
            by=by,
            message=f"{plain} ({finding.message})" if finding.message else plain,
            line=finding.line,
            code=code if own else None,
            node=_node_of(rank) if own else first_node,
            rank=finding.rank,
            ended=None if own else evidence.ended,
        )

    return investigate


def _node_of(rank: int) -> str:
    """The node on which a rank of this job ran; this one, which runs rank 0, where that cannot be known."""
    here = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    tasks = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if rank == 0 or not tasks.isdigit():
        return here
    try:
        listed = client.call("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", here), timeout_s=30)
    except Unavailable:
        return here
    nodes = listed.split()
    return nodes[rank // int(tasks)] if rank // int(tasks) < len(nodes) else here
