"""Full weights as plain transformers loads them: with the adapter merged, as trained, or out of ZeRO's shards."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from ftlib.data import tokenizing
from ftlib.errors import FtError
from ftlib.export import shards
from ftlib.export.merge import MergedTensors
from ftlib.interruptible import interruptible
from ftlib.spec import RunSpec
from ftlib.stop import StopFlag
from ftlib.train import zero


def write_merged(
    spec: RunSpec, model_path: str, device: torch.device, trained: Path, folder: Path, *,
    cache: Path | None = None, dtype: torch.dtype | None = None, stop: StopFlag | None = None,
    committed: Callable[[str], None] = lambda _: None,
) -> None:
    """Write weights of spec.export.dtype, config and tokenizer to `folder`, tensor by tensor; each is merged in fp32
    on `device`. Finished shards are kept (their checksums lie beside the folder) and not written again.
    trained: the adapter's folder, or the checkpoint's. cache: where training keeps 4-bit weights.
    dtype: what the training computed in, as for load_base. Raises InputError, FtError, Interrupted."""
    stop = StopFlag() if stop is None else stop  # One that is not set is falsy.
    # Verifying 4-bit weights that training kept takes a while.
    merged = interruptible(stop, lambda: MergedTensors(spec, model_path, device, trained, cache, dtype))
    shards.write(
        folder, records_of(folder), merged.shapes, merged.dtype, merged.take, stop=stop, committed=committed)
    _write_config(merged.skeleton.config, folder)
    generation = merged.base.model.generation_config
    if generation is not None:
        generation.save_pretrained(str(folder))
    tokenizing.pretrained(model_path, spec.model.revision, spec.tokens.add)[0].save_pretrained(str(folder))


def records_of(folder: Path) -> Path:
    """Where the checksums of a folder's finished shards are."""
    return folder.with_name(f"{folder.name}-{shards.RECORDS}")


def masters(checkpoint: Path) -> dict[str, Any]:
    """The fp32 master weights in a ZeRO checkpoint by name; `.contiguous()` gathers one. The files are mapped."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = zero.shards(checkpoint)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(checkpoint, folder.name, lazy_mode=True)
        except (OSError, ValueError, KeyError) as error:
            raise FtError(f"the shards in {folder} cannot be joined: {error}") from None
    return found


def write_consolidated(
    spec: RunSpec, model_path: str, checkpoint: Path, folder: Path, stop: StopFlag,
    committed: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write weights, config and tokenizer tensor by tensor, without a GPU, and read them again.
    Returns what equality.json says: a file's tensor must be its master, rounded once. Raises FtError, Interrupted."""
    revision, dtype = spec.model.revision, getattr(torch, spec.export.dtype)
    config = AutoConfig.from_pretrained(model_path, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # Each tied weight once, as transformers saves it.
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    found = masters(checkpoint)
    if wrong := [name for name, shape in shapes.items() if name not in found or found[name].shape != shape]:
        raise FtError(f"{checkpoint}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}")

    def verify(file: Path, names: list[str]) -> dict[str, Any]:
        worst, equal = torch.zeros(()), True
        with safe_open(file, framework="pt") as written:
            for name in names:
                master, read = found[name].contiguous(), written.get_tensor(name)
                equal = equal and torch.equal(master.to(dtype), read)
                worst = torch.maximum(worst, (master.detach() - read.float()).abs().max())
        return {"equal": equal, "max_abs": float(worst)}

    checked = shards.write(
        folder, records_of(folder), shapes, dtype, lambda name: found[name].contiguous().to(dtype), stop=stop,
        committed=committed, verify=verify)
    _write_config(skeleton.config, folder)
    with contextlib.suppress(OSError):  # Not every base has one.
        GenerationConfig.from_pretrained(model_path, revision=revision).save_pretrained(str(folder))
    tokenizing.pretrained(model_path, revision, ())[0].save_pretrained(str(folder))
    return {
        "passed": all(shard["equal"] for shard in checked), "max_abs": max(shard["max_abs"] for shard in checked),
        "tensors": len(shapes), "dtype": spec.export.dtype, "compared": "weights"}


def _write_config(config: PreTrainedConfig, folder: Path) -> None:
    """config.json as transformers saves a model's, whose type of weights it names; training switches the cache off."""
    config.use_cache = True
    config.save_pretrained(str(folder))
