"""What a person should know of a plan that can be carried out: a smaller GPU, one step, long rows."""

import math
from collections.abc import Iterator

from ftlib.plan import gpus, memory
from ftlib.plan.shapes import ModelShape
from ftlib.profile import ClusterProfile, Partition
from ftlib.spec import RunSpec, divisors

# A GPU's memory is planned to this share; the rest is for what the formulas do not see.
FILL = 0.9


def notes(
    spec: RunSpec, profile: ClusterProfile, shape: ModelShape, *, steps: int | None, world_size: int
) -> Iterator[str]:
    """One sentence for each thing worth a second thought. steps: None where the amount of data is not known."""
    yield from _short_run(spec, steps)
    if shape.positions and spec.data.seq_len > shape.positions:
        yield (
            f"data.seq_len: rows of {spec.data.seq_len:,} tokens are longer than the {shape.positions:,} positions "
            f"that {spec.model.name} was trained with; a document beyond them is learned badly, if at all")
    side = profile.partition(gpu=True)
    if side.gpu and not side.gpu.simulated:
        able = gpus.capability(side.gpu)
        if able is not None and able < gpus.BF16_CAPABILITY:
            yield f"{side.gpu.type} has no bf16 units (compute capability {able:g}): it computes far below its peak"
        if smaller := smaller_gpu(spec, profile, shape, world_size):
            assert smaller.gpu
            yield (
                f"a smaller GPU of this site holds the run, and may be free sooner: {smaller.gpu.type} with "
                f'{smaller.gpu.memory_gib:g} GiB, SET="cluster.gpu_partition={smaller.name}"')


def _short_run(spec: RunSpec, steps: int | None) -> Iterator[str]:
    if steps is None:
        return
    warmup = round(spec.optim.warmup_share * steps)  # as the Trainer is told
    if steps == 1:
        yield (
            "the run is one optimizer step, which hardly teaches anything: more train.epochs or train.steps, or a "
            "smaller train.global_batch")
    elif warmup >= steps:
        yield (
            f"optim.warmup_share: all {steps:,} steps are warm-up, so the learning rate never reaches optim.lr; use a "
            "smaller share or more steps")
    elif spec.optim.warmup_share and not warmup:
        yield (
            f"optim.warmup_share: {spec.optim.warmup_share:g} of {steps:,} step{'s' * (steps > 1)} is no step, so the "
            f"first one takes the full learning rate; {1 / steps:.2g} would warm up for one")


def smaller_gpu(spec: RunSpec, profile: ClusterProfile, shape: ModelShape, world_size: int) -> Partition | None:
    """The partition with the smallest GPU that holds training and evaluation, if that is not the chosen one."""
    chosen = profile.partition(gpu=True).gpu
    assert chosen
    known = [side for side in profile.partitions if side.gpu and not side.gpu.simulated]
    for side in sorted(known, key=lambda side: side.gpu.memory_gib if side.gpu else math.inf):
        assert side.gpu
        if side.gpu.memory_gib < chosen.memory_gib and _holds(spec, side, shape, world_size):
            return side
    return None


def _holds(spec: RunSpec, side: Partition, shape: ModelShape, world_size: int) -> bool:
    gpu, per_node = side.gpu, spec.resources.gpus_per_node
    if gpu is None or per_node > side.gpus_per_node or gpus.too_old(gpu):
        return False
    smallest = spec.train.micro_batch or divisors(spec.train.global_batch // world_size)[0]
    if memory.training(shape, spec, smallest, world_size).total_gib > FILL * gpu.memory_gib:
        return False
    host_gib = memory.train_host_gib(shape, spec, nodes=spec.resources.nodes, per_node=per_node)
    # Evaluation lays 16-bit weights over the GPUs of one node.
    needed = memory.evaluation_gpus(shape, spec, gpu.memory_gib, at_most=10**6)
    return needed <= side.gpus_per_node and host_gib <= side.mem_gib_per_node
