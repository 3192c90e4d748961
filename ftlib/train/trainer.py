"""transformers.Trainer, with every step recorded, saves that commit, and a stop that loses nothing."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ftlib import sealing
from ftlib.data.dataset import Order, collate, real_tokens
from ftlib.errors import FtError, Interrupted
from ftlib.metrics import MetricsWriter
from ftlib.rundir import RunDir
from ftlib.runs.events import FirstStep
from ftlib.spec import MethodSpec, TrainSpec
from ftlib.stop import StopFlag
from ftlib.train import methods, ranks, saving, zero
from ftlib.train.interval import Cadence
from ftlib.train.progress import Progress, StartTimes
from ftlib.train.tracking import Tracking


class _Enough(Exception):
    """The validation loss has not improved for long."""


class FineTuner(Trainer):
    """One life of a training. After each optimizer step, in this order: record it, agree whether to stop, save if it is
    due or we stop, stop, validate if it is due. So no validation stands between a warning and the save, and a
    checkpoint says whether the validation of its step is still to be done."""

    def __init__(
        self, *, run: RunDir, life: int, stop: StopFlag, spec: TrainSpec, arguments: TrainingArguments,
        model: torch.nn.Module, train_rows: Dataset[Any], validation_rows: Dataset[Any], metrics: MetricsWriter | None,
        tracking: Tracking | None, cadence: Cadence, times: StartTimes, method: MethodSpec | None = None,
    ) -> None:
        """`metrics` and `tracking` belong to rank 0 and are None elsewhere. method: for one of two stages."""
        self._two_stage = method if method and method.kind == "two-stage" else None
        self.run, self.life, self.stop, self.spec = run, life, stop, spec
        self.metrics, self.tracking, self.cadence, self.times = metrics, tracking, cadence, times
        self.keeping = saving.Keeping(run, life, every=spec.keep_every_steps, metrics=metrics, cadence=cadence)
        self.progress = Progress(arguments.max_steps, spec.log_every_steps)
        self.evaluation_due = False
        self._closed_step: int | None = None
        self._rewritten: Path | None = None
        self._best: tuple[float, int] | None = None
        self._worse = self._tokens = 0
        # The zip format's own checksums would cost another pass; every file has ours.
        torch.serialization.set_crc32_options(False)
        super().__init__(
            model=model, args=arguments, train_dataset=train_rows, eval_dataset=validation_rows, data_collator=collate)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return Order(len(self.train_dataset), self.args.max_steps * self.spec.global_batch, self.spec.seed)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step, and the number of response tokens in all ranks' together."""
        self._began = time.perf_counter()
        if method := self._two_stage:
            prompt = self.state.global_step < method.prompt_share * self.args.max_steps
            methods.enter_stage(self._bare(), prompt=prompt, adapter=not prompt)
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens = sum(real_tokens(batch) for batch in batches)
        return batches, items

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; of two stages both are in it, the prompt at its own learning rate."""
        if self._two_stage is None:
            return super().create_optimizer(*args, **kwargs)
        methods.enter_stage(self._bare(), prompt=True, adapter=True)
        optimizer = super().create_optimizer(*args, **kwargs)
        own = {id(p) for p in self._bare().prompt_encoder.parameters()}
        prompt = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        lr = self._two_stage.prompt_lr or self.args.learning_rate
        optimizer.add_param_group({"params": prompt, "lr": lr, "weight_decay": 0.0})
        return optimizer

    def _bare(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        methods.load(self._bare(), Path(resume_from_checkpoint), trainable=True)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer would walk over all parameters for each micro-batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: rows go to metrics.jsonl, and the Trainer's own history would be saved in every checkpoint."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.spec.gradient_checkpointing:
            # To switch it on, as the Trainer has just done, also makes the embedding's output require gradients, which
            # only reentrant checkpointing needs. It would run the backward pass through every frozen layer.
            self._bare().disable_input_require_grads()
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._rewritten:
            zero.mend(self.optimizer, [self.args.weight_decay, 0.0])
            ranks.barrier()
            if ranks.rank() == 0:
                shutil.rmtree(self._rewritten, ignore_errors=True)
        self.times.done("optimizer_s")
        if self.evaluation_due:  # Left over from the life that saved the checkpoint we go on from.
            self._validate()
            self.times.done("validation_s")
        return prepared

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        step = self.state.global_step
        if step == self._closed_step:  # The Trainer calls once more at the end of an epoch.
            return
        self._closed_step = step
        self._record(tr_loss, grad_norm, learning_rate)
        cause, save_due = ranks.agreed(self.stop, self.cadence.due(step))
        every, keep, last = self.spec.eval_every_steps, self.spec.keep_every_steps, step == self.args.max_steps
        self.evaluation_due = every is not None and (step % every == 0 or last)
        # What is exported out of ZeRO's shards must have the loss that is measured here (ftlib/evaluate/agreement.py).
        self.evaluation_due |= last and self.is_deepspeed_enabled
        if cause or last or save_due or (keep is not None and step % keep == 0):
            self.save()
        if cause:
            raise Interrupted(cause, step)
        if self.evaluation_due:
            self._validate()

    def _record(self, tr_loss: torch.Tensor, grad_norm: Any, lr: float | None) -> None:
        """The step's row. Takes the step's loss out of the Trainer's running sum, which a resume would reset."""
        step = self.state.global_step
        loss, tokens = ranks.summed(tr_loss.item(), float(self._tokens))
        tr_loss.zero_()
        loss /= ranks.world_size()
        norm, seconds = float(grad_norm), time.perf_counter() - self._began
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FtError(
                f"training diverged at step {step}: loss {loss}, gradient norm {norm}. Try a lower optim.lr or a "
                f"longer optim.warmup_share")
        if self.metrics is None:
            return
        if "first_step_s" not in self.times.parts:
            self.times.done("first_step_s")
            made = FirstStep(stage="train", attempt=self.life, step=step, parts_s=dict(self.times.parts))
            self.run.record(made, writer=f"train-{self.life}")
        speed = tokens / seconds
        self.metrics.append(
            step=step, loss=loss, lr=lr, grad_norm=norm, tokens=int(tokens), tokens_per_s=round(speed, 1),
            seconds=round(seconds, 4))
        self.progress.step(step, loss=loss, lr=lr or 0.0, tokens=int(tokens), seconds=seconds)
        if self.tracking:
            self.tracking.log(step, loss=loss, lr=lr or 0.0, grad_norm=norm, tokens_per_s=speed)

    def save(self) -> None:
        """Commit a checkpoint of this step, unless this life has just done so. Collective."""
        # What a first one may take: trained weights and two moments, fp32 at most, and small change. ZeRO's also hold
        # the weights as they are computed with.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        need_bytes = (17 if self.is_deepspeed_enabled else 13) * trained + (1 << 20) * ranks.world_size()
        best = self._best[1] if self._best else None
        self.keeping.save(self.state.global_step, self._write_state, need_bytes, best=best)

    def _write_state(self, folder: Path, sealer: sealing.Sealer) -> None:
        """The Trainer's files in the Trainer's formats (it reads them again), and ours."""
        step = self.state.global_step
        if self.is_deepspeed_enabled:
            zero.save(self.model_wrapped, folder, step)
        if ranks.rank() == 0:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            state = {"step": step, "total": self.args.max_steps, "evaluation_due": self.evaluation_due}
            state |= {"world_size": ranks.world_size()}
            (folder / saving.STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            if not self.is_deepspeed_enabled:
                methods.save(self._bare(), folder)
                sealer.take()
                # As the Trainer does, but hashed and flushed while it is written.
                with sealer.stream(OPTIMIZER_NAME) as stream:
                    torch.save(self.optimizer.state_dict(), stream)
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    def _validate(self) -> None:
        """Do the validation that is due; a stop meanwhile saves it as still due."""
        step = self.state.global_step
        try:
            loss = self.evaluate()["eval_loss"]
        except Interrupted as interrupted:
            self.save()
            raise Interrupted(interrupted.cause, step) from None
        self.evaluation_due = False
        if self.metrics is not None:
            self.metrics.append(step=step, eval_loss=loss)
            print(f"step {step}/{self.args.max_steps}  validation loss {loss:.4f}", flush=True)
            if self.tracking:
                self.tracking.log(step, eval_loss=loss)
        self._worse += 1
        if self._best is None or loss < self._best[0]:
            self._best, self._worse = (loss, step), 0
            self.save()
            self.keeping.prune(step)  # The best one until now may be of no more use.
        if self.spec.stop_after_worse and self._worse >= self.spec.stop_after_worse:
            self.save()
            raise _Enough

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss over all response tokens of the validation rows, the same at any batch and world size.
        Draws no random number, so the training goes on as if there had been none. Raises Interrupted."""
        rows: Any = self.eval_dataset
        batch, world = self.args.per_device_train_batch_size, ranks.world_size()
        starts = range(0, len(rows), batch)
        self.model.eval()
        loss = targets = 0.0
        for turn in range(math.ceil(len(starts) / world)):
            ranks.check(self.stop)
            # A rank that has run out of batches does the last one again, not counted: all make the same calls.
            mine = turn * world + ranks.rank()
            start = starts[min(mine, len(starts) - 1)]
            inputs = self._prepare_inputs(collate([rows[i] for i in range(start, min(start + batch, len(rows)))]))
            count = inputs["labels"][:, 1:].ne(-100).sum()
            with self.compute_loss_context_manager():
                total = self.model(**inputs, num_items_in_batch=1, use_cache=False).loss
            if mine < len(starts):
                loss, targets = loss + float(total), targets + float(count)
        loss, targets = ranks.summed(loss, targets)
        return {"eval_loss": loss / max(targets, 1.0)}

    def go_on_from(self, found: saving.Found, folder: Path | None) -> None:
        """Train to the end from what `found` holds. Raises Interrupted when asked to stop, after a save.
        folder: the checkpoint's, or where it lies rewritten for another number of processes."""
        if found.folder:
            self._closed_step = found.step
            self._best, self._worse = found.best, found.worse
            self.keeping.begun_from(found.step)
            self.evaluation_due = found.evaluation_due
            self.progress.resumed(found.step)
            if found.world_size != ranks.world_size():
                print("another number of processes than before: dropout draws other numbers from here on", flush=True)
            self._rewritten = folder if folder != found.folder else None
        try:
            self.train(resume_from_checkpoint=str(folder) if folder else None)
        except _Enough:
            ranks.say(f"stopped early: no new lowest validation loss in {self._worse} validations")
        finally:
            self.keeping.close()
