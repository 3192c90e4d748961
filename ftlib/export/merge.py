"""Merged weights: dequantise the base that was trained on, attach the adapter, merge in fp32, cast. Or the weights
themselves, where they were trained."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ftlib.data import tokenizing
from ftlib.errors import FtError
from ftlib.spec import RunSpec
from ftlib.train.methods import load_trained
from ftlib.train.model import load_base, quantised_layers


def merged_model(spec: RunSpec, model_path: str, device: torch.device, trained: Path) -> PreTrainedModel:
    """The tuned model as plain weights of spec.export.dtype. Takes 4 bytes a parameter on `device`.

    The base is the one that was trained on, its rounding to 4 bit included: merging into the original weights, or
    rounding the merged ones again, gives another model.
    """
    dtype = getattr(torch, spec.export.dtype)
    if not spec.method.adapts:
        return load_trained(spec, model_path, device, trained).to(dtype)  # type: ignore[return-value]
    base = load_base(spec, model_path, device)
    if spec.method.bits < 16:
        base = base.dequantize(torch.float32)
    return merge(base.float(), trained).to(dtype)


def merge(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`base` with the adapter's updates added to its weights. FtError when it is still quantised."""
    if quantised_layers(base):
        raise FtError("an adapter is not merged into a 4-bit model or an 8-bit one: the sum would be rounded again")
    model = PeftModel.from_pretrained(base, str(adapter))
    return model.merge_and_unload(safe_merge=True)  # type: ignore[no-any-return, operator]


def write_merged(spec: RunSpec, model_path: str, device: torch.device, trained: Path, folder: Path) -> None:
    """Write weights, config and tokenizer to `folder`, as plain transformers loads them. trained: its folder."""
    model = merged_model(spec, model_path, device, trained)
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    tokenizing.pretrained(model_path, spec.model.revision, spec.tokens.add)[0].save_pretrained(str(folder))
