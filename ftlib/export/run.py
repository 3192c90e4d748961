"""The export stage: adapter and merged weights from the last (or best) checkpoint, and the proof that they equal it."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from ftlib import atomic, checkpoint
from ftlib.data import tokenizing
from ftlib.data.dataset import IGNORED, PackedRows, collate
from ftlib.errors import FtError
from ftlib.export.weights import write_consolidated, write_merged
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.train import saving
from ftlib.train.arguments import prepare_process
from ftlib.train.interruptible import interruptible
from ftlib.train.methods import ADAPTER, PROMPT, load_trained, parts, put_prompt
from ftlib.train.model import isolate_documents

ROWS = 64  # held-out rows compared, or all there are
Logits = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def export(run: RunDir, life: int, stop: StopFlag) -> str:
    """Write export/adapter, export/merged (if wished) and export/equality.json; says in one line what was written.
    What an earlier life finished is kept. Raises FtError when the training is not complete or the files compute
    something else than the trained model; Interrupted between the parts."""
    spec, plan = run.spec(), run.plan()
    device = prepare_process(spec, plan, "export")
    found = saving.find(run)
    if found.folder is None or not found.complete:
        have = f"the newest whole checkpoint is step {found.step} of {found.total}" if found.folder else "none"
        raise FtError(f"nothing to export yet: training is not complete ({have}). Run 'make resume RUN={run.name}'")
    run.export.mkdir(exist_ok=True)
    atomic.sweep_temporaries(run.export)
    folder = _best(run, found.best[1]) if spec.train.keep_best and found.best else None
    made = _Parts(run, device, int(plan["micro_batch"]), folder or found.folder, stop)
    if spec.method.adapts or spec.method.prompted:
        made.adapter()
    made.merged_and_equality()
    return made.words()


def _best(run: RunDir, step: int) -> Path | None:
    """The checkpoint with the lowest validation loss; None, and a word, when it is damaged."""
    folder = checkpoint.folder_for(run.checkpoints, step)
    wrong = checkpoint.problems(folder, run=run.name)
    print(f"the best checkpoint is step {step}" + (f", but the last is used: {wrong[0]}" if wrong else ""), flush=True)
    return None if wrong else folder


class _Parts:
    """The parts of one export, each committed by a rename."""

    def __init__(self, run: RunDir, device: torch.device, batch: int, checkpoint: Path, stop: StopFlag) -> None:
        self.run, self.spec, self.model_path = run, run.spec(), str(run.provenance()["model_path"])
        self.device, self.batch, self.checkpoint, self.stop = device, batch, checkpoint, stop
        self.adapter_folder, self.merged_folder = run.export / "adapter", run.export / "merged"
        self.prompt_folder, self.equality_file = run.export / PROMPT, run.export / "equality.json"

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
            print(f"{'soft prompt' if source.name == PROMPT else 'adapter'}: {target}", flush=True)

    def merged_and_equality(self) -> None:
        """The merged weights, committed only when they, and the adapter, compute what the trained model does."""
        wanted, zero = self.spec.export.merged, self.spec.zero.stage
        # equality.json is written before the merged folder's rename: with both there, nothing is left to do.
        if self.equality_file.exists() and self._equality()["passed"] and (self.merged_folder.exists() or not wanted):
            return
        temporary = atomic.temporary_beside(self.merged_folder)
        try:
            if wanted:
                base = Path(self.model_path)
                # At most twice the base's files: a bf16 base written as fp32.
                size = (2 if self.spec.export.dtype == "float32" else 1) * saving.bytes_of(base) if base.is_dir() else 0
                atomic.require_space(self.run.export, size + (16 << 20), "the merged weights")
            if zero:
                found = write_consolidated(self.spec, self.model_path, self.checkpoint, temporary, self.stop)
                found |= {"checkpoint": self.checkpoint.name, "allowed": 0.0}
            else:
                trained = self.adapter_folder if self.spec.method.adapts else self.checkpoint
                if wanted:
                    made = self.spec, self.model_path, self.device, trained, temporary
                    interruptible(self.stop, lambda: write_merged(*made))
                found = self._compare(temporary if wanted else None)
            atomic.write_json(self.equality_file, found)
            if not found["passed"]:
                raise FtError(
                    f"the exported model is not equal to the trained one: {_summary(found)}; "
                    f"{found['allowed']:.2g} on average is allowed (export.max_logit_diff "
                    f"{self.spec.export.max_logit_diff} x their spread). See {self.equality_file}")
            if wanted:
                atomic.commit_folder(temporary, self.merged_folder)
                print(f"merged weights: {self.merged_folder} ({_summary(found)})", flush=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _compare(self, merged: Path | None) -> dict[str, Any]:
        """What equality.json says: merged (if any) and adapter against the model as it was trained.
        Measured on the tiny base, as shares of the logits' spread: right merges 0.006 (float32) to 0.010 (bfloat16),
        merging into the original base or into 4 bit 0.15 and more, no adapter 0.6."""
        made = self.spec, self.model_path, self.device, self.checkpoint
        trained = interruptible(self.stop, lambda: load_trained(*made))
        reference = logits_of(trained, self.device, autocast=self.device.type == "cuda")
        rows = PackedRows(Path(self.run.prepared()["dataset"]) / "validation")
        how = rows, min(ROWS, len(rows)), self.batch, self.stop
        found: dict[str, Any] = {}
        if merged is not None:
            plain = interruptible(
                self.stop,
                lambda: AutoModelForCausalLM.from_pretrained(str(merged), trust_remote_code=False).to(self.device))
            isolate_documents(plain)
            prompt = put_prompt(plain, self.prompt_folder) if self.spec.method.kind == "two-stage" else []
            other = logits_of(plain.eval(), self.device, prompt=prompt)
            found = compare(reference, other, *how)
            del plain, other
        # The same base under both adapters: the logits of one are kept while the other is active.
        pieces = [part for part, _ in parts(trained, self.checkpoint)]
        for part, folder in zip(pieces, (self.adapter_folder, self.prompt_folder), strict=False):
            part.load_adapter(str(folder), "exported")

        def under(name: str) -> Any:
            def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
                for part in pieces:
                    part.set_adapter(name, inference_mode=True)
                return reference(inputs)

            return logits

        adapter = compare(under("default"), under("exported"), *how) if pieces else None
        found = found or adapter
        # Both compute in bf16, whose rounding grows with the logits: a fixed number would fit one model only.
        allowed = self.spec.export.max_logit_diff * found["spread"]
        return {
            **found, "allowed": allowed,
            "passed": max(found["mean_abs"], adapter["mean_abs"] if adapter else 0.0) <= allowed,
            "adapter": {name: adapter[name] for name in ("max_abs", "mean_abs")} if adapter else None,
            "compared": "merged" if merged is not None else "adapter", "checkpoint": self.checkpoint.name,
            "device": self.device.type,
        }

    def _equality(self) -> dict[str, Any]:
        return dict(json.loads(self.equality_file.read_text(encoding="utf-8")))

    def words(self) -> str:
        """One line for the outcome."""
        made = {"the adapter": self.adapter_folder, "the soft prompt": self.prompt_folder}
        made[f"merged {self.spec.export.dtype} weights"] = self.merged_folder
        sizes = [f"{name} ({saving.bytes_of(at) / 2**20:.1f} MiB)" for name, at in made.items() if at.exists()]
        return f"exported {' and '.join(sizes)}; {_summary(self._equality())}"


def _summary(found: dict[str, Any]) -> str:
    if found["compared"] == "weights":
        equal = "are" if found["passed"] else "are not all"
        return f"{found['tensors']} tensors {equal} the trained ones in {found['dtype']}"
    return (
        f"logits differ by {found['mean_abs']:.2g} on average, {found['max_abs']:.2g} at most, same first choice for "
        f"{found['top1_agreement']:.1%} of {found['tokens']:,} tokens")


@torch.no_grad()
def compare(
    reference: Logits, other: Logits, rows: Dataset[Any], count: int, batch: int, stop: StopFlag
) -> dict[str, Any]:
    """How the logits of all real tokens of the first `count` rows differ, `batch` rows at once.
    max_abs, mean_abs, top1_agreement (a share), spread (the reference's standard deviation), rows, tokens."""
    worst = total = squares = plain = agree = 0.0
    entries = tokens = 0
    for start in range(0, count, batch):
        stop.check()
        inputs = collate([rows[i] for i in range(start, min(start + batch, count))])
        # Every document ends with a target, so what follows a row's last one is padding.
        real = inputs["labels"].ne(IGNORED).flip(1).cumsum(1).flip(1) > 0
        one, two = (model(inputs).float()[real] for model in (reference, other))
        gap = (one - two).abs()
        worst, total = max(worst, float(gap.max())), total + float(gap.double().sum())
        plain, squares = plain + float(one.double().sum()), squares + float(one.double().square().sum())
        agree += float((one.argmax(-1) == two.argmax(-1)).sum())
        entries, tokens = entries + one.numel(), tokens + one.shape[0]
    spread = math.sqrt(max(0.0, squares / entries - (plain / entries) ** 2))
    said = {"max_abs": worst, "mean_abs": total / entries, "top1_agreement": agree / tokens, "spread": spread}
    return {**said, "rows": count, "tokens": tokens}


def logits_of(
    model: torch.nn.Module, device: torch.device, autocast: bool = False, prompt: Sequence[int] = ()
) -> Logits:
    """A function from rows (rows, seq) to `model`'s logits (rows, seq, vocabulary); before each row stands `prompt`."""

    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = {name: values.to(device) for name, values in inputs.items() if name != "labels"}
        if prompt:
            ids = torch.tensor([prompt] * len(moved["input_ids"]), device=device)
            before = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            moved = {name: torch.cat([values, moved[name]], dim=1) for name, values in before.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            # A cache would make the packed documents of a row see each other.
            found = model(**moved, use_cache=False).logits
        # A soft prompt has logits, too.
        return found[:, -inputs["input_ids"].shape[1] :].cpu()  # type: ignore[no-any-return]

    return logits
