"""The plan as a person reads it before anything is queued."""

from rich.console import Console
from rich.table import Table

from ftlib.plan.plan import RunPlan
from ftlib.spec import RunSpec

# Wide enough for every column where the output is no terminal (a log, a pipe).
PLAIN_WIDTH = 110


def console() -> Console:
    """A console that uses the terminal's width, and a fixed one elsewhere. What is printed may hold brackets."""
    found = Console(highlight=False, markup=False)
    found.width = found.width if found.is_terminal else PLAIN_WIDTH
    return found


def minutes(value: float | None) -> str:
    """A duration in minutes as people say it."""
    if value is None:
        return "unknown"
    if value < 1:
        return f"{value * 60:.0f} s"
    return f"{value:.0f} min" if value < 120 else f"{value / 60:.1f} h"


def print_plan(name: str, spec: RunSpec, plan: RunPlan, *, queued: bool = True) -> None:
    """Resources, memory, time and cost of a run; `queued`: its stages are jobs of Slurm."""
    out = console()
    out.print(f"Run {name}: {spec.description}" if spec.description else f"Run {name}")
    rows, needed, there = spec.train.global_batch, plan.gpu_needed_gib, plan.gpu_memory_gib
    ranks = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''} on {plan.stages['train'].device}"
    # Where rows are not packed, an example is one, and about as long as examples are.
    tokens = f"about {rows * plan.row_tokens:,.0f}" if plan.row_tokens else f"{rows * spec.data.seq_len:,}"
    steps = "an unknown number of" if plan.steps is None else f"{plan.steps:,}"
    out.print(f"  {steps} step{'s' * (plan.steps != 1)} of {rows} rows ({tokens} tokens): micro-batch "
              f"{plan.micro_batch} x accumulation {plan.accumulation} x {ranks}")  # fmt: skip
    if needed and there:
        out.print(f"  fits: {needed:.1f} GiB estimated of {there:.0f} GiB on one {plan.gpu} ({needed / there:.0%})")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("stage", "partition", "nodes", "GPUs", "CPUs", "memory", "time limit", "estimate"):
        table.add_column(column, justify="left" if column in ("stage", "partition") else "right")
    for stage, asked in plan.stages.items():
        table.add_row(
            stage, asked.partition, str(asked.nodes), str(asked.gpus_per_node * asked.nodes),
            str(asked.cpus_per_task * asked.tasks_per_node * asked.nodes), f"{asked.mem_gib} GiB",
            minutes(asked.time_min), minutes(asked.estimate_min))
    out.print(table)
    for stages in plan.jobs if queued else ():
        if len(stages) > 1:
            job = plan.request(stages)
            gpus = f"{job.gpus_per_node} GPU{'s' if job.gpus_per_node > 1 else ''}"
            out.print(f"  {' and '.join(stages)} share one job: {gpus}, {job.mem_gib} GiB, {minutes(job.time_min)}")
    if plan.gpu_hours is not None:
        out.print(f"  cost: about {plan.gpu_hours:.1f} GPU-hours")
    elif plan.gpu:
        out.print("  cost: unknown")
    for note in plan.notes:
        out.print(f"  note: {note}")
