"""The tiny twins through all four stages on this device, by every method, with a resume: is it right at all?

Each method trains once without an interruption and once stopped half-way and resumed. Both must end in the same bits in
deterministic mode; where they do not, the first step that differs is named. What was trained is exported and evaluated.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.results import Recorder, Wrong
from benchmarks.lives import sha
from benchmarks.methods import HALF, METHODS, SHORT, STEPS, make_run
from ftlib import checkpoint
from ftlib.errors import FtError, Interrupted
from ftlib.metrics import MetricsWriter, read_metrics
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from jobs import stage

# Without --all-methods a dry run makes these.
DRY = ("qlora", "falcon, qlora")
FIRST = ("qlora", "falcon, qlora", "lora", "full", "freeze")
SECONDS_A_METHOD = 12
NUMBERS = ("loss", "grad_norm", "lr", "tokens")


def run(recorder: Recorder, *, all_methods: bool) -> None:
    """All checks of this group: the methods of large recipes first."""
    names = [*FIRST, *(name for name in METHODS if name not in FIRST)] if all_methods else list(DRY)
    for name in names:
        recipe, settings = METHODS[name]
        recorder.check(
            f"{name}: resume, export, evaluation",
            lambda recipe=recipe, settings=settings: chain(recipe, settings, recorder.device, deterministic=True),
            correctness=True, needs_s=SECONDS_A_METHOD)
    if not recorder.dry:
        recipe, settings = METHODS["qlora"]
        recorder.check(
            "qlora, not deterministic: resume",
            lambda: chain(recipe, settings, recorder.device, deterministic=False), correctness=False,
            needs_s=SECONDS_A_METHOD)


def chain(recipe: str, settings: str, device: str, *, deterministic: bool) -> dict[str, Any]:
    """A recipe from prepare to evaluate. Wrong where the resumed training is not the uninterrupted one (in
    deterministic mode), or a stage's device is not `device`; FtError where a stage fails."""
    settings = f"{SHORT}{settings} train.deterministic={str(deterministic).lower()}"
    values: dict[str, Any] = {"steps": STEPS, "deterministic": deterministic}
    with tempfile.TemporaryDirectory(prefix="gpu-check-twin-") as place:
        root = Path(place)
        try:
            whole = make_run(root / "whole" / "a-run", root / "cache", recipe, settings)
            values |= {f"{name} on": whole.numerics().stages[name].device for name in ("train", "export", "evaluate")}
            halved_folder = root / "halved" / "a-run"
            shutil.copytree(whole.path, halved_folder, symlinks=True)
            halved = RunDir(halved_folder)
            values["train s"] = timed(lambda: train(whole, 1, stop_after=None))
            train(halved, 1, stop_after=HALF)
            train(halved, 2, stop_after=None)
            values |= compared(whole, halved)
            values["export s"] = timed(lambda: stage.export(whole, 1, StopFlag()))
            values["evaluate s"] = timed(lambda: stage.evaluate(whole, 1, StopFlag()))
        finally:
            torch.use_deterministic_algorithms(False)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    elsewhere = [name for name in ("train", "evaluate") if values[f"{name} on"] != device]
    if elsewhere:
        raise Wrong(f"{' and '.join(elsewhere)} did not run on {device}", values)
    if deterministic and not values["resumed equals uninterrupted"]:
        raise Wrong(f"the resumed training differs from step {values['first step that differs']} on", values)
    return values


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 2)


def train(run: RunDir, attempt: int, *, stop_after: int | None) -> None:
    """One attempt of the training stage, asked to stop after a step as a scheduler would ask."""
    stop, append = StopFlag(), MetricsWriter.append

    def stopping(self: MetricsWriter, **row: Any) -> None:
        append(self, **row)
        if row["step"] == stop_after and "loss" in row:
            stop.cause = "gpu-check"

    MetricsWriter.append = stopping  # type: ignore[method-assign]
    try:
        stage.train(run, attempt, stop)
    except Interrupted as interrupted:
        if interrupted.step != stop_after:
            raise FtError(f"stopped at step {interrupted.step}, not {stop_after}") from interrupted
    finally:
        MetricsWriter.append = append  # type: ignore[method-assign]


def compared(whole: RunDir, halved: RunDir) -> dict[str, Any]:
    """Whether both trainings ended in the same bits; the first step whose row differs, and by how much."""
    ends = [checkpoint.folder_for(run.checkpoints, STEPS) for run in (whole, halved)]
    values: dict[str, Any] = {
        "resumed equals uninterrupted": sha(ends[0]) == sha(ends[1]), "first step that differs": None}
    rows = [{row["step"]: row for row in read_metrics(run.metrics_file) if "loss" in row} for run in (whole, halved)]
    values["last loss"] = rows[0][STEPS]["loss"]
    for step in range(1, STEPS + 1):
        one, other = (row.get(step, {}) for row in rows)
        differing = [name for name in NUMBERS if one.get(name) != other.get(name)]
        if differing:
            values["first step that differs"] = step
            values["differing there"] = {name: [one.get(name), other.get(name)] for name in differing}
            break
    return values
