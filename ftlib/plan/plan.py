"""RunPlan: RunSpec and ClusterProfile become each stage's resources, memory, time and cost. Pure.

Made anew for every submission. What decides the bits (ftlib/plan/numerics.py) is planned once, for the first attempt,
and only obeyed afterwards.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ftlib.errors import InputError
from ftlib.plan import advice, amount, memory, refusals, throughput, zero
from ftlib.plan.advice import FILL
from ftlib.plan.numerics import Numerics
from ftlib.plan.shapes import ModelShape
from ftlib.profile import ClusterProfile, Gpu, Partition
from ftlib.runs.ledger import STAGES
from ftlib.runs.overrides import Overrides
from ftlib.spec import Model, RunSpec, divisors

# More tokens a micro-batch than this win little: dequantisation is then 2 % of a step.
MICRO_BATCH_TOKENS = 8192
# Of the host memory that falls to a job's GPUs (their share of the node's) a job asks for this part, where its formula
# needs less: page cache, loader processes and pinned buffers are in no formula, and a GPU's share is no use to others.
HOST_SHARE = 0.5
# A prepare job whose data nobody has measured; it is a CPU job of minutes for what fits a disk.
UNKNOWN_DATA_MIN = 240
STAGE_START_MIN = 0.3
LEAST_TIME_MIN = 20
LEAST_WARNING_S = 120
# Of the longest save that was measured, a warning before the time limit leaves room for this many, and a step.
WARNING_SAVES, WARNING_STEP_S = 1.5, 60
NO_OVERRIDES = Overrides()
# What a node writes to a shared file system in a second, carefully; a save is measured later (ftlib/train/interval.py).
WRITE_BYTES_PER_S = 0.5e9
# What a node gets from the Hub in a second, carefully: a download that takes longer resumes in the next attempt.
DOWNLOAD_BYTES_PER_S = 50e6


class StagePlan(Model):
    """What one stage needs of its job, and what it computes on."""

    device: Literal["cpu", "cuda"] = Field(description="What the stage computes on; cuda only where its job has a GPU")
    partition: str
    qos: str | None
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    mem_gib: int = Field(description="Memory a node, in GiB")
    time_min: int = Field(description="Time limit of one life, in minutes")
    estimate_min: float | None = Field(description="How long the work is thought to take; None: unknown")
    warning_s: int = Field(LEAST_WARNING_S, description="SIGUSR2 comes so long before the time limit")


class RunPlan(Model):
    """How and where a wish is carried out."""

    cluster: str
    world_size: int
    micro_batch: int
    accumulation: int
    threads: int = Field(description="Threads of each training process, pinned: another count is another result")
    deterministic: bool
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        description="Training computes in it: bfloat16 autocast on a GPU, float32 on a CPU")
    steps: int | None = Field(
        description="Optimizer steps; an estimate where the recipe says epochs, None where the data's size is unknown")
    row_tokens: float | None = Field(None, description="Mean tokens of a row, padding not counted; None: seq_len")
    gpu: str | None
    gpu_needed_gib: float | None
    gpu_memory_gib: float | None
    tokens_per_s: float | None = Field(description="Estimated, over all GPUs")
    gpu_hours: float | None = Field(description="Estimated, over all stages")
    zero: dict[str, Any] | None = Field(None, description="DeepSpeed's configuration; none without ZeRO")
    stages: dict[str, StagePlan]
    notes: tuple[str, ...]

    @property
    def jobs(self) -> tuple[tuple[str, ...], ...]:
        """The stages that each job of the chain runs, in order.

        Export and evaluation share one allocation where both ask for GPUs (simulated ones included), so that the run
        does not wait in the queue a second time. A stage without GPUs never holds another's.
        """
        export, evaluate = self.stages["export"], self.stages["evaluate"]
        wanted = [(stage.partition, stage.qos, stage.nodes, stage.tasks_per_node) for stage in (export, evaluate)]
        if export.gpus_per_node and evaluate.gpus_per_node and wanted[0] == wanted[1]:
            return (*((stage,) for stage in STAGES[:-2]), STAGES[-2:])
        return tuple((stage,) for stage in STAGES)

    def request(self, stages: Sequence[str]) -> StagePlan:
        """What the job that runs `stages` one after the other asks for: the most of each resource, all of their time.

        The sum of the time limits may be longer than the partition allows (see ftlib.slurm.batch.request).
        """
        plans = [self.stages[stage] for stage in stages]
        if len(plans) == 1:
            return plans[0]
        resources = ("gpus_per_node", "cpus_per_task", "mem_gib", "warning_s")
        largest = {name: max(getattr(plan, name) for plan in plans) for name in resources}
        estimates = [plan.estimate_min for plan in plans if plan.estimate_min is not None]
        times = {
            "time_min": sum(plan.time_min for plan in plans),
            "estimate_min": sum(estimates) if len(estimates) == len(plans) else None,
        }
        return plans[0].model_copy(update={**largest, **times})

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, values: Any) -> Any:
        """Until version 0.1 a plan had one device for all of its stages, and computed by it."""
        if not isinstance(values, dict) or "device" not in values:
            return values
        values = dict(values)
        device = values.pop("device")
        values.setdefault("compute_dtype", "bfloat16" if device == "cuda" else "float32")
        values["stages"] = {
            name: {"device": device if stage.get("gpus_per_node") else "cpu", **stage}
            for name, stage in values["stages"].items()}
        return values


def make(
    spec: RunSpec, profile: ClusterProfile, shape: ModelShape, *, data_bytes: int | None, download_bytes: int = 0,
    numerics: Numerics | None = None, overrides: Overrides = NO_OVERRIDES, longest_save_s: float = 0.0,
) -> RunPlan:  # fmt: skip
    """The plan of one submission of a run. Pure.

    Args:
        spec: The run's settings, as they were submitted.
        profile: The cluster, with the owner's changes.
        shape: The model's.
        data_bytes: Size of the data file or hub dataset; None for the generator, and for a hub dataset that nobody has
            measured: what follows from its size is unknown then.
        download_bytes: Size of the model's files where prepare fetches them.
        numerics: What a run that exists has begun with, its overrides included; None plans a new run's.
        overrides: What has changed since the run was submitted: here, the memory of its stages.
        longest_save_s: The longest save of a checkpoint so far.

    Raises:
        InputError: It cannot fit, or it would compute on another device than the run has begun on.
    """
    gpu_side, cpu_side = profile.partition(gpu=True), profile.partition(gpu=False)
    gpu = None if gpu_side.gpu is None or gpu_side.gpu.simulated else gpu_side.gpu  # what really computes, if any
    if numerics is not None:
        spec = _as_begun(spec, numerics)
    train, nodes, per_node = spec.train, spec.resources.nodes, spec.resources.gpus_per_node
    world_size = nodes * per_node
    refusals.check_cut(spec, profile, gpu_side)
    per_rank = train.global_batch // world_size
    micro_batch = train.micro_batch or _micro_batch(spec, shape, per_rank, world_size, gpu)
    needed = memory.training(shape, spec, micro_batch, world_size).total_gib if gpu else None
    if gpu and needed and needed > gpu.memory_gib:
        raise InputError(refusals.does_not_fit(spec, gpu.type, needed, gpu.memory_gib, micro_batch))
    threads = numerics.threads if numerics else max(1, min(4, gpu_side.cpus_per_node // per_node))
    # Estimates, the data not being read yet.
    data = amount.estimate(spec, data_bytes)
    steps = train.steps if data.rows is None else train.total_steps(data.rows)
    speed: float | None = None
    if gpu is None or gpu.bf16_tflops:
        tflops = gpu.bf16_tflops if gpu else None
        speed = throughput.tokens_per_s(shape, spec, tflops=tflops, world_size=world_size, threads=threads)
    step_min = train.global_batch * data.row_tokens / speed / 60 if speed else None
    train_min = steps * step_min if steps and step_min else None

    load_min = STAGE_START_MIN + 2 * shape.params / 0.5e9 / 60
    cpus = max(1, min(4, cpu_side.cpus_per_node))
    load_gib = memory.load_host_gib(shape)
    gpu_cpus = max(1, min(8, gpu_side.cpus_per_node // max(1, gpu_side.gpus_per_node)))
    if gpu is None:
        gpu_cpus = min(threads, max(1, gpu_side.cpus_per_node // per_node))

    def stage(name: str, *, gpu: bool, mem_gib: float, minutes: float | None, nodes: int = 1, tasks: int = 1,
              gpus: int = 1, limit: int | None = None, warning_s: float = 0) -> StagePlan:  # fmt: skip
        side = gpu_side if gpu else cpu_side
        if mem_gib > side.mem_gib_per_node:
            way = refusals.host_way(spec, name)
            raise InputError(
                f"{spec.recipe} does not fit: {name} needs {mem_gib:.0f} GiB of host memory, a node of {side.name!r} "
                f"offers {side.mem_gib_per_node:.0f} GiB{way}")
        if gpu and side.gpu and not side.gpu.simulated:
            share = min(tasks * gpus / max(1, side.gpus_per_node), 1)
            mem_gib = max(mem_gib, HOST_SHARE * share * side.mem_gib_per_node)
        mem_gib = max(mem_gib, overrides.memory_mib.get(name, 0) / 1024)
        # Twice the estimate: a life that hits its limit goes on in the next, but waits in the queue for it.
        wanted = limit or (math.ceil(2 * minutes) + LEAST_TIME_MIN if minutes else side.max_time_min)
        device: Literal["cpu", "cuda"] = "cuda" if gpu and side.gpu and not side.gpu.simulated else "cpu"
        begun = numerics.stages.get(name) if numerics else None
        if begun and begun.device != device:
            raise InputError(refusals.another_device(name, begun.device, side))
        return StagePlan(
            device=device, partition=side.name, qos=profile.resolved_qos(gpu=gpu), nodes=nodes, tasks_per_node=tasks,
            gpus_per_node=tasks * gpus if gpu and side.gpu else 0, cpus_per_task=gpu_cpus if gpu else cpus,
            mem_gib=_whole_gib(mem_gib, side), time_min=min(wanted, side.max_time_min), estimate_min=minutes,
            warning_s=max(LEAST_WARNING_S, math.ceil(warning_s)))

    # Rows of the validation split: half of what is held out. Of unknown data as many as are compared at most.
    held_rows = (math.inf if data.tokens is None else data.tokens) * spec.data.held_out / 2 / spec.data.seq_len
    tflops = (gpu.bf16_tflops or throughput.LEAST_GPU_TFLOPS) if gpu else None
    export_min = load_min + throughput.export_min(
        shape, spec, tflops=tflops, threads=threads, validation_rows=held_rows)
    evaluation = throughput.evaluation_min(shape, spec, on_gpu=gpu is not None)
    judging = memory.evaluation_gpus(shape, spec, gpu.memory_gib, gpu_side.gpus_per_node) if gpu else 1
    host_gib = memory.train_host_gib(shape, spec, nodes=nodes, per_node=per_node)
    train_total = load_min + train_min if train_min else None
    # One step, and one save.
    warning_s = 60 * (step_min or 0) + memory.checkpoint_bytes(shape, spec) / nodes / WRITE_BYTES_PER_S
    if longest_save_s:
        warning_s = max(warning_s, WARNING_STEP_S + WARNING_SAVES * longest_save_s)
    download_min = download_bytes / DOWNLOAD_BYTES_PER_S / 60
    asked: dict[str, dict[str, Any]] = {
        "prepare": {"gpu": False, "mem_gib": 4,
                    "minutes": None if data.tokens is None
                    else STAGE_START_MIN + data.tokens / 0.4e6 / 60 + download_min,
                    "limit": None if data.tokens is not None else UNKNOWN_DATA_MIN + math.ceil(2 * download_min)},
        "train": {"gpu": True, "nodes": nodes, "tasks": per_node, "mem_gib": host_gib, "minutes": train_total,
                  "limit": spec.resources.train_time_min, "warning_s": warning_s},
        "export": {"gpu": not spec.zero.stage, "minutes": export_min,
                   "mem_gib": memory.export_host_gib(shape, spec, on_gpu=gpu is not None)},
        "evaluate": {"gpu": True, "gpus": judging, "mem_gib": load_gib, "minutes": 2 * load_min + evaluation},
    }  # fmt: skip
    stages = {name: stage(name, **wanted) for name, wanted in asked.items()}
    hours = None
    if gpu and train_min is not None:
        # A started GPU is paid for while weights load, too.
        judged_min = evaluation + 2 * load_min + (export_min if stages["export"].gpus_per_node else 0)
        hours = ((train_min + load_min) * world_size + judged_min * judging) / 60
    accumulation = per_rank // micro_batch
    cut: dict[str, Any] = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world_size}
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16" if gpu else "float32"
    deterministic = gpu is None if train.deterministic is None else train.deterministic
    sharing = None
    if numerics:
        compute_dtype, deterministic = numerics.compute_dtype, numerics.stages["train"].deterministic
        sharing = numerics.zero
    elif spec.zero.stage:
        sharing = zero.config(spec, **cut, on_gpu=gpu is not None, compute_dtype=compute_dtype)
    rule = f"time and cost assume {throughput.ASSUMED_EFFICIENCY:.0%} of the GPU's peak; not measured on this cluster"
    notes = [rule] if gpu and speed is not None else []
    notes += ["the number of steps is an estimate until the data is packed"] if train.epochs and steps else []
    if steps is None:
        notes.append(
            f"data.hub: nobody has measured {spec.data.hub}, so the number of steps, time and cost are unknown until "
            "it is prepared; train.steps or data.limit bound them, resources.train_time_min sets the time limit")
    notes += advice.notes(spec, profile, shape, steps=steps, world_size=world_size)
    return RunPlan(
        cluster=profile.name, compute_dtype=compute_dtype, **cut, threads=threads, deterministic=deterministic,
        steps=steps,
        row_tokens=data.row_tokens if spec.method.prompted else None,
        gpu=gpu.type if gpu else None, gpu_needed_gib=needed, gpu_memory_gib=gpu.memory_gib if gpu else None,
        tokens_per_s=speed, gpu_hours=hours, stages=stages, zero=sharing,
        notes=(*notes, *filter(None, [profile.missing_account()])))


def _as_begun(spec: RunSpec, numerics: Numerics) -> RunSpec:
    """`spec` with the nodes and the micro-batch that a run which exists computes with."""
    shared = {"nodes": numerics.nodes, "gpus_per_node": numerics.processes_per_node}
    resources = spec.resources.model_copy(update=shared)
    train = spec.train.model_copy(update={"micro_batch": numerics.micro_batch})
    return spec.model_copy(update={"resources": resources, "train": train})


def _whole_gib(wanted: float, side: Partition) -> int:
    """Whole GiB of host memory for sbatch, no more than the node has."""
    return min(math.ceil(wanted), max(1, math.floor(side.mem_gib_per_node)))


def _micro_batch(spec: RunSpec, shape: ModelShape, per_rank: int, world_size: int, gpu: Gpu | None) -> int:
    """The smallest divisor of the rank's rows with enough tokens, or the largest that fits the memory."""
    best = 1
    for rows in divisors(per_rank):
        if gpu and memory.training(shape, spec, rows, world_size).total_gib > FILL * gpu.memory_gib:
            break
        best = rows
        if rows * spec.data.seq_len >= MICRO_BATCH_TOKENS:
            break
    return best


