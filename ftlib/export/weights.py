"""Full weights as plain transformers loads them: with the adapter merged, as trained, or out of ZeRO's shards."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ftlib import atomic
from ftlib.data import tokenizing
from ftlib.errors import FtError
from ftlib.spec import RunSpec
from ftlib.stop import StopFlag
from ftlib.train import zero
from ftlib.train.methods import load_trained
from ftlib.train.model import load_base, quantised_layers

SHARD = "5GB"


def write_merged(spec: RunSpec, model_path: str, device: torch.device, trained: Path, folder: Path) -> None:
    """Write weights of spec.export.dtype, config and tokenizer to `folder`; takes 4 bytes a parameter on `device`.
    trained: the adapter's folder, or the checkpoint's. The base is the one that was trained on, its rounding to 4 bit
    included: merging into the original weights, or rounding again, gives another model."""
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


def masters(checkpoint: Path) -> dict[str, Any]:
    """The fp32 master weights in a ZeRO checkpoint by name; `.contiguous()` gathers one. The files are mapped."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    shards = zero.shards(checkpoint)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(checkpoint, shards.name, lazy_mode=True)
        except (OSError, ValueError, KeyError) as error:
            raise FtError(f"the shards in {shards} cannot be joined: {error}") from None
    return found


def write_consolidated(
    spec: RunSpec, model_path: str, checkpoint: Path, folder: Path, stop: StopFlag
) -> dict[str, Any]:
    """Write weights, config and tokenizer tensor by tensor, without a GPU, and read them again.
    Returns what equality.json says: a file's tensor must be its master, rounded once. Raises FtError, Interrupted."""
    revision, dtype = spec.model.revision, getattr(torch, spec.export.dtype)
    config = AutoConfig.from_pretrained(model_path, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # Each tied weight once, as transformers saves it.
    own = {name: parameter.to(dtype) for name, parameter in skeleton.named_parameters()}
    found = masters(checkpoint)
    if wrong := [name for name, p in own.items() if name not in found or found[name].shape != p.shape]:
        raise FtError(f"{checkpoint}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}")
    folder.mkdir(parents=True)
    split = split_torch_state_dict_into_shards(own, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD)
    worst, equal = torch.zeros(()), True
    for file, names in split.filename_to_tensors.items():
        stop.check()
        rounded = {name: found[name].contiguous().to(dtype) for name in names}
        save_file(rounded, folder / file, metadata={"format": "pt"})
        del rounded
        with safe_open(folder / file, framework="pt") as written:
            for name in names:
                master, read = found[name].contiguous(), written.get_tensor(name)
                equal = equal and torch.equal(master.to(dtype), read)
                worst = torch.maximum(worst, (master.detach() - read.float()).abs().max())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        atomic.write_json(folder / "model.safetensors.index.json", index)
    config.dtype, config.architectures, config.use_cache = dtype, [type(skeleton).__name__], True
    config.save_pretrained(str(folder))
    with contextlib.suppress(OSError):  # Not every base has one.
        GenerationConfig.from_pretrained(model_path, revision=revision).save_pretrained(str(folder))
    tokenizing.pretrained(model_path, revision, ())[0].save_pretrained(str(folder))
    said = {"passed": equal, "max_abs": float(worst), "tensors": len(own), "dtype": spec.export.dtype}
    return said | {"compared": "weights"}
