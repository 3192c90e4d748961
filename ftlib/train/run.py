"""One life of the training stage, from the run folder to a committed checkpoint of the last step."""

# First: it decides what the others load.
import ftlib.train.lean  # noqa: F401

# isort: split

import contextlib
from pathlib import Path

import torch
from torch import distributed as dist

from ftlib import atomic
from ftlib.data.dataset import PackedRows
from ftlib.errors import InputError
from ftlib.interruptible import interruptible
from ftlib.metrics import MetricsWriter, read_metrics
from ftlib.profile import KILL_EVERY_H
from ftlib.rundir import RunDir
from ftlib.runs.events import Resumed
from ftlib.stop import StopFlag
from ftlib.train import methods, ranks, rendezvous, saving, zero
from ftlib.train.arguments import prepare_process, training_arguments
from ftlib.train.interval import Cadence, History, history
from ftlib.train.model import load_base
from ftlib.train.progress import StartTimes
from ftlib.train.tracking import Tracking
from ftlib.train.trainer import FineTuner
from ftlib.train.watch import watched


def train(run: RunDir, life: int, stop: StopFlag) -> str:
    """Train, or go on training, until the last step is committed; says in one line what was done.
    Raises Interrupted (saved, or nothing begun yet), InputError, FtError."""
    times = StartTimes()
    spec, numerics, provenance = run.spec(), run.numerics(), run.provenance()
    dataset = Path(run.prepared()["dataset"])
    train_rows, validation_rows = PackedRows(dataset / "train"), PackedRows(dataset / "validation")
    if not len(train_rows):
        raise InputError(f"{dataset / 'train'}: the dataset has no rows")
    total = spec.train.total_steps(len(train_rows))
    device = prepare_process(numerics, "train", run.stage_plan("train"))
    rendezvous.connect(on_gpu=device.type == "cuda", name=f"{run.path} {life}", always=spec.zero.stage > 0)
    if spec.zero.stage:
        zero.prepare(on_gpu=device.type == "cuda")
    times.done("rendezvous_s")
    first = ranks.rank() == 0
    if first:
        atomic.sweep_temporaries(run.checkpoints)
    found = saving.Found.from_json(ranks.gathered(saving.find(run).to_json() if first else None)[0])
    if (found.step >= total or found.early) and not found.evaluation_due:
        return f"already trained: the checkpoint of step {found.step} is whole{_final_loss(run)}"
    if first and (life > 1 or found.step):
        print(f"life {life} goes on from step {found.step} of {total}", flush=True)
        rejected = (f"{name}: {'; '.join(reasons)}" for name, reasons in found.rejected.items())
        resumed = Resumed(stage="train", attempt=life, step=found.step, rejected=tuple(rejected))
        run.record(resumed, writer=f"train-{life}")
    times.done("check_s")
    ranks.check(stop)
    start = found.folder
    if spec.zero.stage and start and found.world_size != ranks.world_size():
        start = zero.converted(run, found, stop)
        times.done("convert_s")
    arguments = training_arguments(spec, numerics, total, run.checkpoints, universal=start != found.folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(watched(run, life, stop, "train"))
        model_path, cache = provenance["model_path"], Path(provenance["cache"])
        dtype, switches = getattr(torch, numerics.compute_dtype), numerics.kernels
        if ranks.world_size() == 1:
            base = interruptible(
                stop, lambda: load_base(spec, model_path, device, cache, dtype=dtype, switches=switches))
        else:  # One rank alone must not leave while the others wait for it.
            base = load_base(spec, model_path, device, cache, dtype=dtype, switches=switches)
        model = methods.attach(base, spec, model_path)
        if provenance.get("init_adapter") and not found.step:
            methods.load(model, Path(provenance["init_adapter"]), trainable=True)
            ranks.say(f"the adapter begins as {provenance['init_adapter']}")
        times.done("load_s")
        ranks.check(stop)
        metrics = tracking = None
        if first:
            metrics, tracking = MetricsWriter(run.metrics_file, life), Tracking(run, spec.tracking)
            stack.callback(metrics.close)
            stack.callback(tracking.finish)
        scheduler = (provenance.get("profile") or {}).get("scheduler") or {}
        past = history(run, life) if first else History()
        cadence = Cadence(spec.train.save_every_steps, scheduler.get("kill_every_h", KILL_EVERY_H), past)
        trainer = FineTuner(
            run=run, life=life, stop=stop, spec=spec.train, arguments=arguments, model=model, train_rows=train_rows,
            validation_rows=validation_rows, metrics=metrics, tracking=tracking, cadence=cadence, times=times,
            method=spec.method)
        ranks.check(stop)
        ranks.say(
            f"training {total - found.step} steps of {spec.train.global_batch} rows x {spec.data.seq_len} tokens "
            f"(ready after {sum(times.parts.values()):.1f} s)")
        if words := cadence.words():
            ranks.say(words)
        trainer.go_on_from(found, start)
    ranks.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    done = trainer.state.global_step
    early = "" if done == total else f" of {total}, stopped early,"
    return f"trained {done} steps{early}{_final_loss(run)}"


def _final_loss(run: RunDir) -> str:
    rows = read_metrics(run.metrics_file)
    losses = [row["loss"] for row in rows if "loss" in row][-20:]
    validation = [row["eval_loss"] for row in rows if "eval_loss" in row][-1:]
    words = f", loss {sum(losses) / len(losses):.4f} over the last {len(losses)}" if losses else ""
    return words + (f", validation loss {validation[0]:.4f}" if validation else "")
