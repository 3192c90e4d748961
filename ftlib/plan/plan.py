"""RunPlan: RunSpec and ClusterProfile become each stage's resources, memory, time and cost. Pure."""

import math
from typing import Any, Literal

from pydantic import Field

from ftlib.errors import InputError
from ftlib.plan import memory, throughput, zero
from ftlib.plan.shapes import ModelShape
from ftlib.profile import ClusterProfile, Partition
from ftlib.spec import Model, RunSpec, divisors

# A GPU's memory is planned to this share; the rest is for what the formulas do not see.
FILL = 0.9
# More tokens a micro-batch than this win little: dequantisation is then 2 % of a step.
MICRO_BATCH_TOKENS = 8192
TOKENS_PER_PAIR = {"brief": 125, "alpaca": 210, "chatml": 200, "guanaco": 450}
BYTES_PER_TOKEN = 3.5
STAGE_START_MIN = 0.3
LEAST_TIME_MIN = 20
LEAST_WARNING_S = 120
# What a node writes to a shared file system in a second, carefully; a save is measured later (ftlib/train/interval.py).
WRITE_BYTES_PER_S = 0.5e9


class StagePlan(Model):
    """What one stage's job asks for."""

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
    device: Literal["cpu", "cuda"]
    world_size: int
    micro_batch: int
    accumulation: int
    threads: int = Field(description="Threads of each training process, pinned: another count is another result")
    deterministic: bool
    steps: int = Field(description="Optimizer steps; an estimate where the recipe says epochs")
    gpu: str | None
    gpu_needed_gib: float | None
    gpu_memory_gib: float | None
    tokens_per_s: float | None = Field(description="Estimated, over all GPUs")
    gpu_hours: float | None = Field(description="Estimated, over all stages")
    zero: dict[str, Any] | None = Field(None, description="DeepSpeed's configuration; none without ZeRO")
    stages: dict[str, StagePlan]
    notes: tuple[str, ...]


def make(spec: RunSpec, profile: ClusterProfile, shape: ModelShape, *, data_bytes: int | None) -> RunPlan:
    """The plan of a run; InputError when it cannot fit. `data_bytes`: size of the data file, None for the generator."""
    gpu_side, cpu_side = profile.partition(gpu=True), profile.partition(gpu=False)
    gpu = gpu_side.gpu
    on_gpu = gpu is not None and not gpu.simulated
    nodes, per_node = spec.resources.nodes, spec.resources.gpus_per_node
    _check_fits_node(profile, gpu_side, nodes, per_node)
    world_size = nodes * per_node
    per_rank = _rows_per_rank(spec, world_size)
    gpu_memory_gib = gpu.memory_gib if gpu and on_gpu else None
    micro_batch = spec.train.micro_batch or _micro_batch(spec, shape, per_rank, world_size, gpu_memory_gib)
    if per_rank % micro_batch:
        raise InputError(
            f"train.micro_batch: {micro_batch} does not divide a rank's {per_rank} rows; allowed: {divisors(per_rank)}")
    needed = memory.training(shape, spec, micro_batch, world_size).total_gib if on_gpu else None
    if gpu and on_gpu and needed is not None and needed > gpu.memory_gib:
        raise InputError(_does_not_fit(spec, gpu.type, needed, gpu.memory_gib, micro_batch))
    threads = max(1, min(4, gpu_side.cpus_per_node // per_node))
    steps, tokens = _length(spec, data_bytes)
    speed: float | None = None
    if not on_gpu or (gpu and gpu.bf16_tflops):
        tflops = gpu.bf16_tflops if gpu and on_gpu else None
        speed = throughput.tokens_per_s(shape, spec, tflops=tflops, world_size=world_size, threads=threads)
    train_min = steps * spec.train.global_batch * spec.data.seq_len / speed / 60 if speed else None

    load_min = STAGE_START_MIN + 2 * shape.params / 0.5e9 / 60
    cpus = max(1, min(4, cpu_side.cpus_per_node))
    load_gib = memory.load_host_gib(shape)
    gpu_cpus = threads if not on_gpu else max(1, min(8, gpu_side.cpus_per_node // max(1, gpu_side.gpus_per_node)))

    def stage(name: str, *, gpu: bool, mem_gib: float, minutes: float | None, nodes: int = 1, tasks: int = 1,
              gpus: int = 1, limit: int | None = None, warning_s: float = 0) -> StagePlan:  # fmt: skip
        side = gpu_side if gpu else cpu_side
        if mem_gib > side.mem_gib_per_node:
            way = ". Try more resources.nodes, or zero.offload=none" if spec.zero.offload != "none" else ""
            raise InputError(
                f"{spec.recipe} does not fit: {name} needs {mem_gib:.0f} GiB of host memory, a node of {side.name!r} "
                f"offers {side.mem_gib_per_node:.0f} GiB{way}")
        # Twice the estimate: a life that hits its limit goes on in the next, but waits in the queue for it.
        wanted = limit or (math.ceil(2 * minutes) + LEAST_TIME_MIN if minutes else side.max_time_min)
        return StagePlan(
            partition=side.name, qos=profile.resolved_qos(gpu=gpu), nodes=nodes, tasks_per_node=tasks,
            gpus_per_node=tasks * gpus if gpu and side.gpu else 0, cpus_per_task=gpu_cpus if gpu else cpus,
            mem_gib=math.ceil(mem_gib), time_min=min(wanted, side.max_time_min), estimate_min=minutes,
            warning_s=max(LEAST_WARNING_S, math.ceil(warning_s)))

    evaluation = throughput.evaluation_min(shape, spec, on_gpu=on_gpu)
    judging = memory.evaluation_gpus(shape, spec, gpu.memory_gib, gpu_side.gpus_per_node) if gpu and on_gpu else 1
    host_gib = memory.train_host_gib(shape, spec, nodes=nodes, per_node=per_node)
    train_total = load_min + train_min if train_min else None
    # One step, and one save.
    warning_s = 60 * (train_min or 0) / steps + memory.checkpoint_bytes(shape, spec) / nodes / WRITE_BYTES_PER_S
    asked: dict[str, dict[str, Any]] = {
        "prepare": {"gpu": False, "mem_gib": 4, "minutes": STAGE_START_MIN + tokens / 0.4e6 / 60},
        "train": {"gpu": True, "nodes": nodes, "tasks": per_node, "mem_gib": host_gib, "minutes": train_total,
                  "limit": spec.resources.train_time_min, "warning_s": warning_s},
        "export": {"gpu": False, "mem_gib": memory.export_host_gib(shape, spec), "minutes": 3 * load_min},
        "evaluate": {"gpu": True, "gpus": judging, "mem_gib": load_gib, "minutes": 2 * load_min + evaluation},
    }  # fmt: skip
    stages = {name: stage(name, **wanted) for name, wanted in asked.items()}
    hours = None
    if on_gpu and train_min is not None:
        # A started GPU is paid for while weights load, too.
        hours = ((train_min + load_min) * world_size + (evaluation + 2 * load_min) * judging) / 60
    cut: dict[str, Any] = {"micro_batch": micro_batch, "accumulation": per_rank // micro_batch}
    cut["world_size"] = world_size
    sharing = zero.config(spec, **cut, on_gpu=on_gpu) if spec.zero.stage else None
    deterministic = spec.train.deterministic if spec.train.deterministic is not None else not on_gpu
    return RunPlan(
        cluster=profile.name, device="cuda" if on_gpu else "cpu", **cut, threads=threads, deterministic=deterministic,
        steps=steps, gpu=gpu.type if gpu else None, gpu_needed_gib=needed, gpu_memory_gib=gpu_memory_gib,
        tokens_per_s=speed, gpu_hours=hours, zero=sharing, stages=stages,
        notes=_notes(spec, profile, assumed=on_gpu and speed is not None))


def _check_fits_node(profile: ClusterProfile, side: Partition, nodes: int, per_node: int) -> None:
    problems = []
    if side.gpu and per_node > side.gpus_per_node:
        problems.append(
            f"resources.gpus_per_node: {per_node} asked for, a node of {side.name!r} has {side.gpus_per_node}")
    if profile.scheduler is None and (nodes > 1 or per_node > max(1, side.gpus_per_node)):
        problems.append(f"resources: without Slurm one process trains; found nodes {nodes}, gpus_per_node {per_node}")
    if problems:
        raise InputError(problems)


def _rows_per_rank(spec: RunSpec, world_size: int) -> int:
    if spec.train.global_batch % world_size:
        raise InputError(
            f"train.global_batch: {spec.train.global_batch} rows cannot be shared by {world_size} GPUs; "
            f"use a multiple of {world_size}, or a number of GPUs among {divisors(spec.train.global_batch)}")
    return spec.train.global_batch // world_size


def _micro_batch(spec: RunSpec, shape: ModelShape, per_rank: int, world_size: int, gpu_memory_gib: float | None) -> int:
    """The smallest divisor of the rank's rows with enough tokens, or the largest that fits the memory."""
    best = 1
    for rows in divisors(per_rank):
        if gpu_memory_gib and memory.training(shape, spec, rows, world_size).total_gib > FILL * gpu_memory_gib:
            break
        best = rows
        if rows * spec.data.seq_len >= MICRO_BATCH_TOKENS:
            break
    return best


def _does_not_fit(spec: RunSpec, gpu: str, needed: float, there: float, micro_batch: int) -> str:
    mends = ["train.gradient_checkpointing=true"] if not spec.train.gradient_checkpointing else []
    mends += ["a smaller train.micro_batch"] if micro_batch > 1 else ["a shorter data.seq_len"]
    if spec.method.kind == "full":
        mends += [f"zero.stage={spec.zero.stage + 1}"] if spec.zero.stage < 3 else ["more resources.nodes"]
        mends += ["zero.offload=cpu"] if spec.zero.stage and spec.zero.offload == "none" else []
    mends += ["method.kind=qlora"] if spec.method.bits > 4 and not spec.zero.stage else []
    return (
        f"{spec.recipe} does not fit: {needed:.1f} GiB estimated for micro-batch {micro_batch}, one {gpu} has "
        f"{there:.1f} GiB. Try {', '.join(mends)}, or another cluster.gpu_partition")


def _length(spec: RunSpec, data_bytes: int | None) -> tuple[int, float]:
    """Optimizer steps and tokens of the data; both estimates, the data not being read yet."""
    if data_bytes is None:
        pairs = min(spec.data.pairs, spec.data.limit or spec.data.pairs)
        tokens = float(pairs * TOKENS_PER_PAIR[spec.data.template])
    else:
        tokens = data_bytes / BYTES_PER_TOKEN
        if spec.data.limit:
            tokens = min(tokens, spec.data.limit * TOKENS_PER_PAIR[spec.data.template])
    tokens *= spec.data.share or 1
    if spec.train.steps:
        return spec.train.steps, tokens
    assert spec.train.epochs is not None
    rows = max(1.0, tokens / spec.data.seq_len)
    return max(1, math.ceil(spec.train.epochs * rows / spec.train.global_batch)), tokens


def _notes(spec: RunSpec, profile: ClusterProfile, *, assumed: bool) -> tuple[str, ...]:
    notes = []
    if assumed:
        notes.append(
            f"time and cost assume {throughput.ASSUMED_EFFICIENCY:.0%} of the GPU's peak; not measured on this cluster")
    if spec.train.epochs:
        notes.append("the number of steps is an estimate until the data is packed")
    if missing := profile.missing_account():
        notes.append(missing)
    return tuple(notes)
