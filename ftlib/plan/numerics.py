"""Numerics: what decides the bits of a run. Stored in its folder before the first attempt; only overrides change it.

Everything that only decides where and for how long a job runs (partition, memory, time, …) is no part of it: that is
computed anew for every submission (ftlib/plan/plan.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ftlib import atomic
from ftlib.errors import InputError, Unreadable
from ftlib.runs.overrides import Overrides
from ftlib.spec import Model, RunSpec, divisors

FILE = "numerics.json"
# The loss of a response has no deterministic kernel on a GPU, and kept answers are not computed again.
NEVER_DETERMINISTIC = ("evaluate",)


class KernelSwitches(Model):
    """Which of several kernels for the same computation is used; they round differently."""

    attention: Literal["sdpa"] = Field("sdpa", description="Attention implementation of transformers")
    cudnn_attention: bool = Field(
        False, description="On a GPU, PyTorch may use cuDNN's attention (NaN gradients with masks in torch 2.13)")
    expanded_key_heads: bool = Field(
        True, description="The one key head of Falcon-7B is expanded, so that fused attention kernels can be used; "
        "never in float32 on a CPU")


class StageNumerics(Model):
    """What decides the bits of one stage beside the run's."""

    device: Literal["cpu", "cuda"] = Field(description="What the stage computes on")
    deterministic: bool = Field(description="PyTorch's deterministic mode")


class Numerics(Model):
    """What decides the bits of a run."""

    format: Literal[1] = Field(1, description="Version of this file's format")
    nodes: int = Field(ge=1, description="Nodes of the training")
    processes_per_node: int = Field(ge=1, description="Training processes on each node, one for each GPU")
    micro_batch: int = Field(ge=1, description="Rows of a forward pass of one training process")
    accumulation: int = Field(ge=1, description="Micro-batches of each training process in an optimizer step")
    threads: int = Field(ge=1, description="CPU threads of each process: another number sums in another order")
    compute_dtype: Literal["float32", "bfloat16"] = Field(description="Type that the training computes in")
    zero: dict[str, Any] | None = Field(None, description="DeepSpeed's configuration; null without ZeRO")
    kernels: KernelSwitches = Field(KernelSwitches(), description="Which of several kernels are used")
    stages: dict[str, StageNumerics] = Field(description="Device and determinism of each stage")
    versions: dict[str, str] = Field({}, description="Dependency lock in env/ -> digest of its content")

    @property
    def world_size(self) -> int:
        """Training processes on all nodes together."""
        return self.nodes * self.processes_per_node

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all training processes: train.global_batch."""
        return self.micro_batch * self.accumulation * self.world_size

    def overridden(self, overrides: Overrides) -> Numerics:
        """These numerics with the run's overrides: the rows of an optimizer step stay the same.

        InputError where the processes cannot share these rows.
        """
        nodes = overrides.nodes or self.nodes
        micro_batch = overrides.micro_batch or self.micro_batch
        if (nodes, micro_batch) == (self.nodes, self.micro_batch) and not overrides.versions:
            return self
        world_size, rows = nodes * self.processes_per_node, self.rows_per_step
        if rows % world_size:
            raise InputError(
                f"resources.nodes: {rows} rows of an optimizer step cannot be shared by {world_size} GPUs; use a "
                f"number of GPUs among {divisors(rows)}")
        rows_of_rank = rows // world_size
        if rows_of_rank % micro_batch:
            raise InputError(
                f"train.micro_batch: {micro_batch} does not divide the {rows_of_rank} rows of each rank; allowed: "
                f"{divisors(rows_of_rank)}")
        accumulation = rows_of_rank // micro_batch
        zero = self.zero
        if zero is not None:
            batch = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
            zero = {**zero, **batch}
        return self.model_copy(update={
            "nodes": nodes, "micro_batch": micro_batch, "accumulation": accumulation, "zero": zero,
            "versions": {**self.versions, **overrides.versions}})  # fmt: skip


def first(spec: RunSpec, plan: dict[str, Any], versions: dict[str, str]) -> Numerics:
    """The numerics of a new run, as its first plan (a RunPlan as plain data) has them.

    versions: dependency lock -> digest of its content.
    """
    return _of_plan(plan, deterministic=spec.train.deterministic, versions=versions)


def stored(folder: Path) -> Numerics:
    """The numerics in a run's folder, without overrides; those of a run of the first release are in its plan.

    InputError where they are missing or damaged.
    """
    file = folder / FILE
    if file.exists():
        try:
            return Numerics.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unreadable(f"{file}: cannot be read ({_first_problem(error)})") from None
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        provenance = folder / "provenance.json"
        locks = json.loads(provenance.read_text(encoding="utf-8")).get("locks", {}) if provenance.exists() else {}
        return _of_plan(plan, deterministic=(spec.get("train") or {}).get("deterministic"), versions=locks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(
            f"{folder}: there is no {FILE}, and its plan.json does not hold the numerics of a run of the first release "
            f"({_first_problem(error)})") from None


def write(folder: Path, numerics: Numerics) -> None:
    """Store the numerics of a run before its first attempt."""
    atomic.write_text(folder / FILE, numerics.model_dump_json(indent=1) + "\n")


def _of_plan(plan: dict[str, Any], *, deterministic: bool | None, versions: dict[str, str]) -> Numerics:
    """The numerics in a plan as plain data; `deterministic` as the recipe says it.

    A plan of the first release has one device for all of its stages, and GPUs in some. Its export computed on that
    device but was planned on a CPU node, where it could not: where it goes is left to today's plan.
    """
    device = plan.get("device")
    devices = {}
    for name, stage in plan["stages"].items():
        if device is None:
            devices[name] = stage["device"]
        elif name != "export":
            devices[name] = device if stage["gpus_per_node"] else "cpu"
    compute_dtype = plan.get("compute_dtype") or ("bfloat16" if device == "cuda" else "float32")
    train = plan["stages"]["train"]
    stages = {
        name: StageNumerics(device=device, deterministic=_deterministic(name, device, deterministic))
        for name, device in devices.items()}
    return Numerics(
        nodes=train["nodes"], processes_per_node=train["tasks_per_node"], micro_batch=plan["micro_batch"],
        accumulation=plan["accumulation"], threads=plan["threads"], compute_dtype=compute_dtype,
        zero=plan.get("zero"), stages=stages, versions=versions)


def _deterministic(stage: str, device: str, requested: bool | None) -> bool:
    if stage in NEVER_DETERMINISTIC:
        return False
    return device == "cpu" if requested is None else requested


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
