"""The plan as a person reads it before anything is queued."""

from rich.console import Console
from rich.table import Table

from ftlib.plan.plan import RunPlan
from ftlib.spec import RunSpec

# Wide enough for every column where the output is no terminal (a log, a pipe).
PLAIN_WIDTH = 110


def console() -> Console:
    """A console that uses the terminal's width, and a fixed one elsewhere."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def minutes(value: float | None) -> str:
    """A duration in minutes as people say it."""
    if value is None:
        return "unknown"
    if value < 1:
        return f"{value * 60:.0f} s"
    return f"{value:.0f} min" if value < 120 else f"{value / 60:.1f} h"


def print_plan(name: str, spec: RunSpec, plan: RunPlan) -> None:
    """Resources, memory, time and cost of a run."""
    out = console()
    out.print(f"Run {name}: {spec.description}" if spec.description else f"Run {name}", markup=False)
    rows = plan.micro_batch * plan.accumulation * plan.world_size
    tokens = rows * spec.data.seq_len
    out.print(
        f"  {plan.steps:,} steps of {rows} rows ({tokens:,} tokens): micro-batch {plan.micro_batch} x accumulation "
        f"{plan.accumulation} x {plan.world_size} process{'es' if plan.world_size > 1 else ''} on {plan.device}",
        markup=False)
    if plan.gpu_needed_gib is not None and plan.gpu_memory_gib is not None:
        share = plan.gpu_needed_gib / plan.gpu_memory_gib
        out.print(
            f"  fits: {plan.gpu_needed_gib:.1f} GiB estimated of {plan.gpu_memory_gib:.0f} GiB on one {plan.gpu} "
            f"({share:.0%})",
            markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("stage", "partition", "nodes", "GPUs", "CPUs", "memory", "time limit", "estimate"):
        table.add_column(column, justify="left" if column in ("stage", "partition") else "right")
    for stage, asked in plan.stages.items():
        table.add_row(
            stage, asked.partition, str(asked.nodes), str(asked.gpus_per_node * asked.nodes),
            str(asked.cpus_per_task * asked.tasks_per_node * asked.nodes), f"{asked.mem_gib} GiB",
            minutes(asked.time_min), minutes(asked.estimate_min))
    out.print(table)
    if plan.gpu_hours is not None:
        out.print(f"  cost: about {plan.gpu_hours:.1f} GPU-hours", markup=False)
    for note in plan.notes:
        out.print(f"  note: {note}", markup=False)
