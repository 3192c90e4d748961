"""What a plan refuses, and what a person is told to do instead. Pure."""

from ftlib.errors import InputError
from ftlib.plan import gpus
from ftlib.profile import ClusterProfile, Partition
from ftlib.spec import RunSpec, divisors


def check_cut(spec: RunSpec, profile: ClusterProfile, side: Partition) -> None:
    """InputError where the GPUs asked for are not there, or cannot share the rows of a step."""
    per_node, world_size = spec.resources.gpus_per_node, spec.resources.nodes * spec.resources.gpus_per_node
    rows, micro_batch, problems = spec.train.global_batch, spec.train.micro_batch, []
    if side.gpu and per_node > side.gpus_per_node:
        problems.append(
            f"resources.gpus_per_node: {per_node} asked for, a node of {side.name!r} has {side.gpus_per_node}")
    if profile.scheduler is None and (spec.resources.nodes > 1 or per_node > max(1, side.gpus_per_node)):
        problems.append(f"resources: without Slurm one process trains; found nodes {spec.resources.nodes}, "
                        f"gpus_per_node {per_node}")  # fmt: skip
    if rows % world_size:
        problems.append(f"train.global_batch: {rows} rows cannot be shared by {world_size} GPUs; use a multiple of "
                        f"{world_size}, or a number of GPUs among {divisors(rows)}")  # fmt: skip
    elif micro_batch and (rows // world_size) % micro_batch:
        problems.append(f"train.micro_batch: {micro_batch} does not divide a rank's {rows // world_size} rows; "
                        f"allowed: {divisors(rows // world_size)}")  # fmt: skip
    if side.gpu and not side.gpu.simulated and (fault := gpus.too_old(side.gpu)):
        others = [p.name for p in profile.partitions if p.gpu and not p.gpu.simulated and not gpus.too_old(p.gpu)]
        way = f"choose one of {', '.join(others)}" if others else "no partition of this profile has a newer GPU"
        problems.append(f"gpu_partition: {side.name!r}: {fault}; {way}")
    if problems:
        raise InputError(problems)


def another_device(stage: str, begun: str, side: Partition) -> str:
    """A stage of a run that exists would compute on another device than it has begun on."""
    names = {"cpu": "a CPU", "cuda": "a GPU"}
    return (
        f"{stage}: this run has begun on {names[begun]}, and partition {side.name!r} would compute it on another "
        "device, which gives other results. Choose a partition of the same kind, or submit another run")


def host_way(spec: RunSpec, stage: str) -> str:
    """What makes a stage that needs more host memory than a node has need less; empty where nothing does."""
    if stage == "export" and spec.export.merged and spec.method.adapts:
        return ". Try export.merged=false: the adapter alone is exported then"
    if stage == "train" and spec.zero.offload != "none":
        return ". Try more resources.nodes, or zero.offload=none"
    return ""


def does_not_fit(spec: RunSpec, gpu: str, needed: float, there: float, micro_batch: int) -> str:
    """The training needs more of a GPU than it has: `needed` and `there` in GiB."""
    fixes = ["train.gradient_checkpointing=true"] if not spec.train.gradient_checkpointing else []
    fixes += ["a smaller train.micro_batch"] if micro_batch > 1 else ["a shorter data.seq_len"]
    if spec.method.kind == "full":
        fixes += [f"zero.stage={spec.zero.stage + 1}"] if spec.zero.stage < 3 else ["more resources.nodes"]
        fixes += ["zero.offload=cpu"] if spec.zero.stage and spec.zero.offload == "none" else []
    fixes += ["method.kind=qlora"] if spec.method.bits > 4 and not spec.zero.stage else []
    return (
        f"{spec.recipe} does not fit: {needed:.1f} GiB estimated for micro-batch {micro_batch}, one {gpu} has "
        f"{there:.1f} GiB. Try {', '.join(fixes)}, or another cluster.gpu_partition")
