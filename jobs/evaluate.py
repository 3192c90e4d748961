"""The evaluate stage: how good the tuned model is beside its base, and the run's report."""

from __future__ import annotations

import contextlib

from ftlib.rundir import RunDir
from ftlib.stop import StopFlag


def main(run: RunDir, life: int, stop: StopFlag) -> str:
    """Evaluate the run's models, print the table, write the report; returns words for the outcome."""
    from ftlib.evaluate.evaluate import evaluate
    from ftlib.report.page import write_report
    from ftlib.report.plan import console
    from ftlib.report.tables import evaluation_table

    with _watched(run, life, stop):
        evaluation = evaluate(run, stop)
    console().print(evaluation_table(evaluation))
    report = write_report(run)
    base, tuned = evaluation["base"], evaluation["tuned"]
    words = [
        f"{score} {base[score]:.4g} -> {tuned[score]:.4g}"
        for score in ("exact", "perplexity")
        if base[score] is not None and tuned[score] is not None
    ]
    return f"{', '.join(words)} on {tuned['n']} held-out pairs; the report is {report}"


def _watched(run: RunDir, life: int, stop: StopFlag) -> contextlib.AbstractContextManager[object]:
    """The GPU's use is sampled, and an idle one ends the stage before the site does; nothing without a GPU."""
    if run.plan()["device"] != "cuda":
        return contextlib.nullcontext()
    import torch

    from ftlib.train.watch import GpuWatch

    limit = (run.provenance().get("profile") or {}).get("gpu_idle_limit_min")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return GpuWatch(run, life, stop, uuid=uuid, stage="evaluate", limit_min=limit)
