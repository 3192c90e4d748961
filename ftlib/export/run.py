"""The export stage: adapter and merged weights from the last (or best) checkpoint, and the proof that they equal it."""

import gc
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ftlib import atomic, checkpoint
from ftlib.data import tokenizing
from ftlib.data.dataset import PackedRows
from ftlib.errors import FtError
from ftlib.export import equality
from ftlib.export.equality import Comparison, logits_of
from ftlib.export.weights import write_consolidated, write_merged
from ftlib.interruptible import interruptible
from ftlib.metrics import read_metrics
from ftlib.plan.numerics import Numerics
from ftlib.rundir import RunDir
from ftlib.runs import events
from ftlib.stop import StopFlag
from ftlib.train import saving
from ftlib.train.arguments import prepare_process
from ftlib.train.falcon import fuse_attention, isolate_documents
from ftlib.train.methods import ADAPTER, PROMPT, load_trained, parts, put_prompt

# What is not finished yet. Nobody looks for it, and the next attempt finds there what this one committed.
UNFINISHED = ".unfinished"


def export(run: RunDir, life: int, stop: StopFlag) -> str:
    """Write export/adapter, export/merged (if wished) and export/equality.json; says in one line what was written.
    What an earlier attempt finished is kept: the adapter, each shard, each batch of the comparison. Raises FtError when
    the training is not complete or the files compute something else than the trained model; Interrupted."""
    spec, numerics = run.spec(), run.numerics()
    device = prepare_process(numerics, "export", run.stage_plan("export"))
    found = saving.find(run)
    if found.folder is None or not found.complete:
        have = f"the newest whole checkpoint is step {found.step} of {found.total}" if found.folder else "none"
        raise FtError(f"nothing to export yet: training is not complete ({have}). Run 'make resume RUN={run.name}'")
    run.export.mkdir(exist_ok=True)
    atomic.sweep_temporaries(run.export)
    folder = _best(run, found.best[1]) if spec.train.keep_best and found.best else None
    stage = _Export(run, life, device, numerics, folder or found.folder, stop)
    if spec.method.adapts or spec.method.prompted:
        stage.adapter()
    stage.merged_and_equality()
    return stage.outcome()


def _best(run: RunDir, step: int) -> Path | None:
    """The checkpoint with the lowest validation loss; None, and a word, when it is damaged."""
    folder = checkpoint.folder_for(run.checkpoints, step)
    wrong = checkpoint.problems(folder, run=run.name)
    print(f"the best checkpoint is step {step}" + (f", but the last is used: {wrong[0]}" if wrong else ""), flush=True)
    return None if wrong else folder


class _Export:
    """The parts of one export, each committed by a rename."""

    def __init__(
        self, run: RunDir, life: int, device: torch.device, numerics: Numerics, checkpoint: Path, stop: StopFlag
    ) -> None:
        provenance = run.provenance()
        self.run, self.life, self.spec, self.stop = run, life, run.spec(), stop
        self.model_path, self.cache = str(provenance["model_path"]), _cache(provenance)
        self.device, self.numerics, self.checkpoint = device, numerics, checkpoint
        self.dtype: torch.dtype = getattr(torch, numerics.compute_dtype)
        self.adapter_folder, self.merged_folder = run.export / "adapter", run.export / "merged"
        self.prompt_folder, self.equality_file = run.export / PROMPT, run.export / "equality.json"
        self.unfinished = run.export / UNFINISHED

    def adapter(self) -> None:
        """The checkpoint's adapter, by itself, with the tokenizer where that was changed; and two-stage's prompt."""
        self.stop.check()
        atomic.require_space(self.run.export, saving.bytes_of(self.checkpoint), "the adapter")
        places = [(self.checkpoint, self.adapter_folder)]
        if self.spec.method.kind == "two-stage":
            places.append((self.checkpoint / PROMPT, self.prompt_folder))
        for source, target in places:
            if target.exists():
                continue
            temporary = atomic.temporary_beside(target)
            temporary.mkdir()
            for name in ADAPTER:
                shutil.copyfile(source / name, temporary / name)
            config = json.loads((temporary / ADAPTER[0]).read_text(encoding="utf-8"))
            atomic.write_json(temporary / ADAPTER[0], config | {"base_model_name_or_path": self.model_path})
            if add := self.spec.tokens.add:
                tokenizing.pretrained(self.model_path, self.spec.model.revision, add)[0].save_pretrained(str(temporary))
            atomic.commit_folder(temporary, target)
            self._committed(target.name)
            print(f"{'soft prompt' if source.name == PROMPT else 'adapter'}: {target}", flush=True)

    def merged_and_equality(self) -> None:
        """The merged weights, committed only when they, and the adapter, compute what the trained model does."""
        wanted = self.spec.export.merged
        # equality.json is written before the merged folder's rename: with both there, nothing is left to do.
        if self.equality_file.exists() and self._equality()["passed"] and (self.merged_folder.exists() or not wanted):
            shutil.rmtree(self.unfinished, ignore_errors=True)
            return
        self._open_unfinished()
        merged = self.unfinished / "merged"
        if self.spec.zero.stage:
            found = write_consolidated(
                self.spec, self.model_path, self.checkpoint, merged, self.stop, self._committed)
            found |= {"checkpoint": self.checkpoint.name, "allowed": 0.0} | self._expected_loss()
        else:
            if wanted:
                trained = self.adapter_folder if self.spec.method.adapts else self.checkpoint
                write_merged(
                    self.spec, self.model_path, self.device, trained, merged, cache=self.cache,
                    dtype=self.dtype, stop=self.stop, committed=self._committed)
            found = self._compare(merged if wanted else None)
        atomic.write_json(self.equality_file, found)
        self._committed("equality.json")
        if not found["passed"]:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise FtError(
                f"the exported model is not equal to the trained one: {_summary(found)}; "
                f"{found['allowed']:.2g} on average is allowed (export.max_logit_diff "
                f"{self.spec.export.max_logit_diff} x their spread). See {self.equality_file}")
        if wanted:
            atomic.commit_folder(merged, self.merged_folder)
            print(f"merged weights: {self.merged_folder} ({_summary(found)})", flush=True)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _open_unfinished(self) -> None:
        """The folder of what is not finished, empty where an earlier attempt exported something else, or otherwise."""
        manifest = self.checkpoint / checkpoint.MANIFEST
        expected = {
            "checkpoint": self.checkpoint.name, "manifest": manifest.read_text(encoding="utf-8"),
            "model_path": self.model_path, "export": self.spec.export.model_dump(mode="json"),
            "device": self.device.type, "compute_dtype": self.numerics.compute_dtype,
            "versions": [version(name) for name in ("torch", "transformers", "peft")]}
        file = self.unfinished / "what.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found != expected:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir()
            atomic.write_json(file, expected)

    def _compare(self, merged: Path | None) -> dict[str, Any]:
        """What equality.json says: merged (if any) and adapter against the model as it was trained.
        Measured on the tiny base, as shares of the logits' spread: right merges 0.006 (float32) to 0.010 (bfloat16),
        merging into the original base or into 4 bit 0.15 and more, no adapter 0.6."""
        rows = PackedRows(Path(self.run.prepared()["dataset"]) / "validation")
        budget_s = 60 * self.spec.export.equality_minutes
        comparison = Comparison(
            self.unfinished / "equality", rows, count=min(equality.ROWS, len(rows)),
            batch=self.numerics.micro_batch, vocabulary=_vocabulary(self.run, self.model_path), budget_s=budget_s,
            stop=self.stop, committed=self._committed)
        if not comparison.progress.stored_all:
            self._store_trained(comparison, share=equality.REFERENCE_SHARE if merged else 1.0)
            _free(self.device)
        if merged is not None and not comparison.finished:
            self._compare_merged(comparison, merged)
            _free(self.device)
        progress = comparison.progress
        adapter = progress.adapter.summary() if progress.adapter.tokens else None
        found = progress.merged.summary() if merged is not None else adapter
        assert found is not None
        # Both compute in bf16, whose rounding grows with the logits: a fixed number would fit one model only.
        allowed = self.spec.export.max_logit_diff * found["spread"]
        return {
            **found, "tokens_at_most": comparison.tokens_at_most, "seconds": round(progress.seconds, 1),
            "allowed": allowed,
            "passed": max(found["mean_abs"], adapter["mean_abs"] if adapter else 0.0) <= allowed,
            "adapter": {name: adapter[name] for name in ("max_abs", "mean_abs")} if adapter else None,
            "compared": "merged" if merged is not None else "adapter", "checkpoint": self.checkpoint.name,
            "device": self.device.type}

    def _store_trained(self, comparison: Comparison, *, share: float) -> None:
        """The trained model's logits, and the exported adapter's over the same base."""
        trained = interruptible(self.stop, lambda: load_trained(
            self.spec, self.model_path, self.device, self.checkpoint, self.cache, dtype=self.dtype,
            switches=self.numerics.kernels))
        # As in training's forward pass, on whatever device.
        logits = logits_of(trained, self.device, autocast=self.dtype is torch.bfloat16)
        pieces = [part for part, _ in parts(trained, self.checkpoint)]
        for part, folder in zip(pieces, (self.adapter_folder, self.prompt_folder), strict=False):
            part.load_adapter(str(folder), "exported")

        def under(name: str) -> equality.Logits:
            def logits_under(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
                for part in pieces:
                    part.set_adapter(name, inference_mode=True)
                return logits(inputs)

            return logits_under

        comparison.store(under("default"), under("exported") if pieces else None, share=share)

    def _compare_merged(self, comparison: Comparison, merged: Path) -> None:
        plain = interruptible(self.stop, lambda: load_merged(merged, self.device, self.unfinished / "offloaded"))
        isolate_documents(plain)
        if self.device.type == "cuda" and self.numerics.kernels.expanded_key_heads:
            fuse_attention(plain)
        prompt = put_prompt(plain, self.prompt_folder) if self.spec.method.kind == "two-stage" else []
        comparison.compare(logits_of(plain.eval(), self.device, prompt=prompt))

    def _expected_loss(self) -> dict[str, Any]:
        """The validation loss that training measured at this checkpoint, which evaluation requires of the files."""
        step = int(json.loads((self.checkpoint / saving.STATE).read_text(encoding="utf-8"))["step"])
        rows = [row for row in read_metrics(self.run.metrics_file) if "eval_loss" in row and row["step"] == step]
        return {"expected_loss": rows[-1]["eval_loss"] if rows else None}

    def _committed(self, piece: str) -> None:
        events.progressed(self.run.path, "export", self.life, piece)

    def _equality(self) -> dict[str, Any]:
        return dict(json.loads(self.equality_file.read_text(encoding="utf-8")))

    def outcome(self) -> str:
        """One line for the outcome."""
        made = {"the adapter": self.adapter_folder, "the soft prompt": self.prompt_folder}
        made[f"merged {self.spec.export.dtype} weights"] = self.merged_folder
        sizes = [f"{name} ({saving.bytes_of(at) / 2**20:.1f} MiB)" for name, at in made.items() if at.exists()]
        return f"exported {' and '.join(sizes)}; {_summary(self._equality())}"


def load_merged(folder: Path, device: torch.device, offloaded: Path) -> Any:
    """The merged model to compute with. Where the GPU has not room for all of it, the rest stays in its files and is
    read for each forward pass."""
    if device.type != "cuda":
        return AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False).to(device)
    free = torch.cuda.mem_get_info(device)[0]
    needed = sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))
    if needed < MERGED_SHARE * free:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), device_map={"": str(device)}, trust_remote_code=False)
    return AutoModelForCausalLM.from_pretrained(
        str(folder), device_map="auto", max_memory={device.index or 0: int(0.5 * free), "cpu": 0},
        offload_folder=str(offloaded), trust_remote_code=False)


# Of the GPU's free memory; the rest is for activations and logits.
MERGED_SHARE = 0.8


def _free(device: torch.device) -> None:
    """Give back what a dropped model held, before another is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cache(provenance: dict[str, Any]) -> Path | None:
    return Path(provenance["cache"]) if provenance.get("cache") else None


def _vocabulary(run: RunDir, model_path: str) -> int:
    from transformers import AutoConfig

    spec = run.spec()
    config = AutoConfig.from_pretrained(model_path, revision=spec.model.revision, trust_remote_code=False)
    return int(config.get_text_config().vocab_size) + len(spec.tokens.add)


def _summary(found: dict[str, Any]) -> str:
    if found["compared"] == "weights":
        equal = "are" if found["passed"] else "are not all"
        return f"{found['tensors']} tensors {equal} the trained ones in {found['dtype']}"
    at_most = found.get("tokens_at_most", found["tokens"])
    return (
        f"logits differ by {found['mean_abs']:.2g} on average, {found['max_abs']:.2g} at most, same first choice for "
        f"{found['top1_agreement']:.1%} of {found['tokens']:,} tokens"
        + (f" (of {at_most:,}: the time budget ended)" if found["tokens"] < at_most else ""))
