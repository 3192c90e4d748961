"""Merged weights: dequantise the base, attach the adapter, merge in fp32, cast. Or the weights that were trained."""

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


def write_merged(spec: RunSpec, model_path: str, device: torch.device, trained: Path, folder: Path) -> None:
    """Write weights of spec.export.dtype, config and tokenizer to `folder`, as plain transformers loads them.
    trained: the adapter's folder, or the checkpoint's. Takes 4 bytes a parameter on `device`. The base is the one that
    was trained on, its rounding to 4 bit included: merging into the original weights, or rounding again, gives another
    model."""
    if spec.method.adapts:
        base = load_base(spec, model_path, device)
        if spec.method.bits < 16:
            base = base.dequantize(torch.float32)
        model = merge(base.float(), trained)
    else:
        model = load_trained(spec, model_path, device, trained)
    model = model.to(getattr(torch, spec.export.dtype))
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    tokenizing.pretrained(model_path, spec.model.revision, spec.tokens.add)[0].save_pretrained(str(folder))


def merge(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`base` with the adapter's updates added to its weights. FtError when it is still quantised."""
    if quantised_layers(base):
        raise FtError("an adapter is not merged into a 4-bit model or an 8-bit one: the sum would be rounded again")
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
