"""What a life of each stage does: `main` of its package, loaded where it can be interrupted. Words for the outcome."""

from __future__ import annotations

import contextlib
import importlib
import os
from types import ModuleType

from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.sweepdir import share_prepared


def prepare(run: RunDir, life: int, stop: StopFlag) -> str:
    """Examples become a packed dataset that later runs reuse."""
    from ftlib.data.prepare import prepare

    prepared = prepare(run, stop)
    # After prepared.json was written: who adds a sibling looks for it, so that none is missed.
    share_prepared(run, run.siblings())
    train = prepared["train"]
    found = "found" if prepared["reused"] else "packed"
    return f"{found} {train['examples']:,} examples in {train['rows']:,} rows, {prepared['test']:,} to test with"


def train(run: RunDir, life: int, stop: StopFlag) -> str:
    """The training, on every rank."""
    return str(_loaded("ftlib.train.run", stop).train(run, life, stop))


def export(run: RunDir, life: int, stop: StopFlag) -> str:
    """Adapter and merged weights, and the proof that they are equal."""
    return str(_loaded("ftlib.export.run", stop).export(run, life, stop))


def _loaded(package: str, stop: StopFlag) -> ModuleType:
    from ftlib.train.interruptible import interruptible

    if os.environ.get("WORLD_SIZE", "1") == "1":  # one rank alone must not leave
        return interruptible(stop, lambda: importlib.import_module(package))
    return importlib.import_module(package)


def evaluate(run: RunDir, life: int, stop: StopFlag) -> str:
    """How good the tuned model is beside its base: the table, and the run's report."""
    from ftlib.evaluate.evaluate import evaluate
    from ftlib.report.page import write_report
    from ftlib.report.plan import console
    from ftlib.report.tables import evaluation_table

    with _watched(run, life, stop):
        evaluation = evaluate(run, stop)
    console().print(evaluation_table(evaluation))
    report = write_report(run)
    base, tuned = evaluation["base"], evaluation["tuned"]
    both = (score for score in ("exact", "perplexity") if base[score] is not None and tuned[score] is not None)
    words = ", ".join(f"{score} {base[score]:.4g} -> {tuned[score]:.4g}" for score in both)
    return f"{words} on {tuned['n']} held-out pairs; the report is {report}"


def _watched(run: RunDir, life: int, stop: StopFlag) -> contextlib.AbstractContextManager[object]:
    """The GPU's use is sampled, and an idle one ends the stage before the site does; nothing without a GPU."""
    if run.plan()["device"] != "cuda":
        return contextlib.nullcontext()
    import torch

    from ftlib.train.watch import GpuWatch

    limit = (run.provenance().get("profile") or {}).get("gpu_idle_limit_min")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return GpuWatch(run, life, stop, uuid=uuid, stage="evaluate", limit_min=limit)
