"""What a stage's job was submitted with, recorded beside its script and its logs.

    RUN/slurm/STAGE/request.json             the last submission's, written before sbatch is called
    RUN/slurm/STAGE/JOB_request.json         the same, once the job has an id

A person reads it, and the job itself, to check that Slurm gave it what it was submitted with. It is never read for the
next submission: that one is planned anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftlib.plan.plan import RunPlan, StagePlan
from ftlib.profile import ClusterProfile
from ftlib.slurm import batch

FILE = "request.json"
FORMAT = 1


class Memory(NamedTuple):
    """Host memory of a job, on each of its nodes, in MiB; None where it is not known."""

    requested_mib: int | None
    node_mib: int | None  # the most that a node of the partition offers


UNKNOWN = Memory(None, None)


def memory(profile: ClusterProfile, request: StagePlan) -> Memory:
    """What a job requests, and the most it could."""
    node_gib = profile.partition(gpu=request.gpus_per_node > 0).mem_gib_per_node
    return Memory(1024 * request.mem_gib, 1024 * max(1, math.floor(node_gib)))


def write(
    run: Path, profile: ClusterProfile, plan: RunPlan, stages: Sequence[str], job: StagePlan | None = None
) -> None:  # fmt: skip
    """Record in a run's folder what the job of `stages` is about to be submitted with. Makes the folders of its logs,
    which Slurm does not. job: what it requests, where that is more than the plan's (an array's)."""
    job = job or batch.request(profile, plan, stages)
    for stage in stages:
        folder = run / "slurm" / stage
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "format": FORMAT, "stage": plan.stages[stage].model_dump(mode="json"), "stages_of_job": list(stages),
            "job": job.model_dump(mode="json"), "account": profile.account, "exclude": profile.exclude,
        }  # fmt: skip
        # Not flushed to storage: after a crash of the machine there is no job that would read it.
        temporary = folder / f".{FILE}"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / FILE)


def keep(run: Path, stages: Sequence[str], job_id: str) -> None:
    """Keep the record of the job that has just been submitted under its id."""
    for stage in stages:
        folder = run / "slurm" / stage
        with contextlib.suppress(OSError):  # a file system without hard links, or a second submission: for people only
            os.link(folder / FILE, folder / f"{job_id}_{FILE}")
