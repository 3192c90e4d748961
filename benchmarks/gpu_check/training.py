"""Some steps of the project's own training stage, on a model that was never on a disk, with its speed and its peak.

Only two things are replaced: the base that is loaded is made on the device, and the recomputation of every n-th layer,
which the recipes cannot say yet, is put into the Trainer's arguments. Whatever else is measured is what runs do.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import ftlib.train.run
from benchmarks.gpu_check import models
from benchmarks.gpu_check.results import Wrong
from ftlib import rundir
from ftlib.data import packing
from ftlib.data.tokenizing import Documents
from ftlib.metrics import read_metrics
from ftlib.plan import numerics, shapes, throughput
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved
from ftlib.stop import StopFlag
from ftlib.train import preflight
from jobs import wish as wishes

WARM_STEPS, TIMED_STEPS = 3, 8
DRY_STEPS = 1
# Lengths of instruction data: median about 200 tokens, a long tail (log-normal).
MEDIAN_TOKENS, SPREAD = 200, 0.6
# The first loss of two ways to compute one model: bf16's rounding, summed over the layers.
LOSS_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train, beside the recipe."""

    name: str
    settings: str  # as for SET=
    packed: bool = True
    liger: bool = False
    varlen: bool = False
    recompute_every: int = 1  # of so many layers one is recomputed in the backward pass


@dataclass(frozen=True, kw_only=True)
class Large:
    """A large recipe: its name, its model's on the hub, and what a dry run changes."""

    recipe: str
    model: str
    dry_settings: str = "data.seq_len=128 train.micro_batch=2 train.global_batch=2"


def measure(
    large: Large, setting: Setting, *, device: torch.device, dry: bool, expected_loss: float | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Train some steps; returns speed, peak, plan and loss. expected_loss: of the first step; Wrong where it is
    another. around: entered for the training alone."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-large-") as place:
        run = make_run(Path(place), large, setting, dry=dry)
        torch.set_grad_enabled(True)
        reset_peak(device)
        try:
            with replaced(large, setting, device=device, dry=dry), around():
                ftlib.train.run.train(run, 1, StopFlag())
            values = figures(run, large, setting, device=device, dry=dry)
        finally:
            # Deterministic mode is the process's; the next setting begins without it.
            torch.use_deterministic_algorithms(False)
            reset_peak(device)
    if expected_loss is not None and abs(values["first loss"] - expected_loss) > LOSS_TOLERANCE * expected_loss:
        raise Wrong(f"the first loss is {values['first loss']:.4f}, not {expected_loss:.4f}", values)
    return values


def make_run(place: Path, large: Large, setting: Setting, *, dry: bool) -> RunDir:
    """A run of `large` on this machine, with synthetic documents in place of the recipe's data."""
    config = models.config_of(large.model, dry=dry)
    model_folder = place / "model"
    model_folder.mkdir()
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model_folder / "model.safetensors").write_bytes(b"")  # never read: the base is made on the device
    for file in (wishes.CHECKOUT / "models" / "tiny-llama3").glob("tokenizer*"):
        shutil.copy(file, model_folder)
    steps = warm_steps(dry=dry) + (DRY_STEPS if dry else TIMED_STEPS)
    words = (f"model.name={model_folder} train.epochs=null train.steps={steps} tracking.mode=disabled "
             f"{setting.settings} {large.dry_settings if dry else ''}")  # fmt: skip
    wish = wishes.make(model=large.recipe, data=None, cluster="local", settings=words)
    files = wishes.files_of(wish, "a-run")
    files["provenance.json"]["cache"] = str(place / "cache")
    if dry:
        files[numerics.FILE]["threads"] = 1  # too little work to share
    run = rundir.create(place / "runs", "a-run", files, wishes.SNAPSHOT)
    dataset = place / "dataset"
    spec = wish.spec
    rows = spec.train.global_batch * steps
    for name, count in (("train", rows), ("validation", 2)):
        write_rows(dataset / name, count, spec.data.seq_len, config["vocab_size"], packed=setting.packed)
    run.prepared_file.write_text(json.dumps({"dataset": str(dataset)}), encoding="utf-8")
    return run


def warm_steps(*, dry: bool) -> int:
    """Steps that are not timed: kernels are chosen and memory is taken in them."""
    return DRY_STEPS if dry else WARM_STEPS


def write_rows(folder: Path, rows: int, seq_len: int, vocabulary: int, *, packed: bool) -> None:
    """At least `rows` rows of documents of random tokens, the same each time; the second half of each is a target."""
    generator = np.random.default_rng(0)
    documents = Documents(seq_len)
    # Unpacked, a document is a row.
    total = rows if not packed else int(2 * rows * seq_len / MEDIAN_TOKENS)
    median = min(MEDIAN_TOKENS, seq_len // 4)
    lengths = np.clip(generator.lognormal(np.log(median), SPREAD, total).astype(int), 8, seq_len)
    for length in lengths.tolist():
        documents.tokens.extend(array("I", generator.integers(3, vocabulary, length).tolist()))
        documents.targets.extend(array("B", [0] * (length // 2) + [1] * (length - length // 2)))
        documents.lengths.append(length)
    packing.write(folder, documents, vocabulary=vocabulary, pad=0, seed=0, packed=packed)


@contextmanager
def replaced(large: Large, setting: Setting, *, device: torch.device, dry: bool) -> Iterator[None]:
    """The training stage with a base that is made on the device, and with what the recipes cannot say yet."""
    original = ftlib.train.run.training_arguments

    def load_base(spec: Any, *_: Any, **__: Any) -> Any:
        model = models.quantised_model(
            models.config_of(large.model, dry=dry), device, quant_type=spec.method.quant_type,
            double_quant=spec.method.double_quant)
        if setting.liger:
            from benchmarks.gpu_check import variants

            variants.apply_liger(model)
        if setting.varlen:
            from benchmarks.gpu_check import variants

            variants.apply_varlen(model)
        return model

    def training_arguments(*args: Any, **kwargs: Any) -> Any:
        arguments = original(*args, **kwargs)
        if setting.recompute_every > 1:
            arguments.activation_checkpointing_kwargs["every_n_layers"] = setting.recompute_every
        return arguments

    with mock.patch.multiple(ftlib.train.run, load_base=load_base, training_arguments=training_arguments):
        yield


def figures(run: RunDir, large: Large, setting: Setting, *, device: torch.device, dry: bool) -> dict[str, Any]:
    """What the run's own metrics and events say, and the device's peak. Without a GPU the peak stays null."""
    rows = [row for row in read_metrics(run.metrics_file) if "loss" in row]
    timed = rows[warm_steps(dry=dry) :]
    spec, plan = run.spec(), run.plan()
    shape = shapes.from_config(models.config_of(large.model, dry=dry), large.recipe)
    speed = statistics.median(row["tokens_per_s"] for row in timed)
    saves = run.ledger().of(CheckpointSaved)
    on_gpu = device.type == "cuda"
    return {
        "setting": setting.name, "tokens/s": round(speed), "step s": statistics.median(row["seconds"] for row in timed),
        "GPU peak GiB": round(preflight.peak_gib("cuda"), 2) if on_gpu else None,
        "allocated peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "planned GiB": round(plan["gpu_needed_gib"], 2) if plan["gpu_needed_gib"] else None,
        "TFLOP/s by the planner's count": round(speed * throughput.flops_per_token(shape, spec) / 1e12, 1),
        "micro-batch": plan["micro_batch"], "seq_len": spec.data.seq_len, "real tokens a step": rows[-1]["tokens"],
        "first loss": round(rows[0]["loss"], 5), "loss": round(rows[-1]["loss"], 5),
        "save s": saves[-1].seconds if saves else None, "save bytes": saves[-1].bytes if saves else None,
    }


def reset_peak(device: torch.device) -> None:
    """Free what an earlier setting left, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
