"""What Slurm gave a stage beside what its plan says, and the GPUs that one process uses of that.

Standard library only: it runs before anything heavy is imported, and before CUDA reads CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from ftlib.errors import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Where Slurm lists the GPUs of this node, the step's before the job's. srun sets them in each task, for simulated GPUs
# too, whatever the batch script did to CUDA_VISIBLE_DEVICES; of a job without GPUs it takes that variable away.
LISTS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "GPU_DEVICE_ORDINAL", VISIBLE)
# CUDA_VISIBLE_DEVICES of a job without GPUs, by older Slurms.
NONE_GIVEN = ("", "NoDevFiles")


def check(stage: str, plan: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """InputError where Slurm gave this task of `stage` something else than its plan (StagePlan as data) says.

    A job may hold more GPUs than the stage asks for (it shares the job with another), but a CPU stage holds none.
    Outside Slurm there is nothing to check.
    """
    if "SLURM_JOB_ID" not in environment:
        return
    node = environment.get("SLURMD_NODENAME") or os.uname().nodename
    planned, given = int(plan["gpus_per_node"]), gpus_given(environment)
    job, where = environment["SLURM_JOB_ID"], f"partition {plan['partition']!r}"
    problems = []
    if given < planned:
        problems.append(
            f"{stage}: its plan asks for {_gpus(planned)} a node of {where}, but Slurm gave job {job} {_gpus(given)} "
            f"on node {node}. Does the profile name that partition's GPUs rightly (gpu.gres, ask_gpus_by)?")
    elif given and not planned:
        problems.append(
            f"{stage}: its plan is for a CPU ({where}), but Slurm gave job {job} {_gpus(given)} on node {node}, which "
            'would do nothing. Name a partition whose jobs get none: SET="cluster.cpu_partition=…"')
    elif planned and len(visible(environment, given)) < planned:
        problems.append(
            f"{stage}: its plan asks for {_gpus(planned)} a node, but {VISIBLE} on node {node} shows this process "
            f"{_gpus(len(visible(environment, given)))} of {given} ({environment[VISIBLE]!r}). Does the site bind GPUs "
            "to tasks, or a module or start-up file of your shell set it?")
    planned_tasks, tasks = plan["nodes"] * plan["tasks_per_node"], environment.get("SLURM_NTASKS", "1")
    if tasks != str(planned_tasks):
        problems.append(
            f"{stage}: its plan is for {plan['nodes']} x {plan['tasks_per_node']} processes, but Slurm started "
            f"{tasks} in job {job}. A variable such as SLURM_NTASKS or SBATCH_… may have leaked into the job")
    if problems:
        raise InputError(problems)


def gpus_given(environment: Mapping[str, str]) -> int:
    """How many GPUs of this node Slurm gave to the job of this task."""
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if count.isdigit():
        return int(count)
    listed = next((environment[name] for name in LISTS if name in environment), "")
    return len(_entries(listed))


def visible(environment: Mapping[str, str], count: int) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES: indices, or UUIDs of GPUs or of MIG slices.

    count: how many GPUs there are, for where the variable is not set and all are visible.
    """
    if VISIBLE not in environment:
        return [str(index) for index in range(count)]
    return _entries(environment[VISIBLE])


def narrow(plan: Mapping[str, Any], environment: MutableMapping[str, str]) -> None:
    """Show this process only the GPUs that its stage plans for: none where it computes on a CPU, and a single process
    as many as are its own, on a workstation or in a job that it shares.

    A library that sees two GPUs may use both (transformers' Trainer doubles the batch). Several ranks keep all of
    their node's: NCCL's peer-to-peer needs them visible, and each rank is told its own by LOCAL_RANK.
    """
    planned = int(plan["gpus_per_node"])
    if plan["device"] == "cpu":
        environment[VISIBLE] = ""
    elif plan["nodes"] * plan["tasks_per_node"] == 1:
        environment[VISIBLE] = ",".join(visible(environment, planned)[:planned])


def _entries(text: str) -> list[str]:
    return [] if text in NONE_GIVEN else [entry.strip() for entry in text.split(",")]


def _gpus(count: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")
