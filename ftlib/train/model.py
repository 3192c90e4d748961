"""The base model, quantised for real, with its LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftlib.data.base_model import WEIGHTS, loading
from ftlib.errors import FtError, InputError, unknown
from ftlib.spec import MethodSpec, RunSpec
from ftlib.train import quantised, ranks


def load_base(spec: RunSpec, model_path: str, device: torch.device, cache: Path | None = None) -> PreTrainedModel:
    """The frozen base on `device`: 4-bit for qlora, else bf16 on a GPU and fp32 on a CPU. Attention is sdpa.

    cache: where 4-bit weights are kept for the next life, if that pays; to the bit what quantising anew gives.
    Raises InputError when its files are missing or cannot be read, FtError when a layer was not quantised.
    """
    method = spec.method
    # What is not quantised (embeddings, norms, head) stays fp32 on a CPU: bf16 gains nothing there.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options: dict[str, Any] = {}
    if method.kind == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.quant_type,
            bnb_4bit_use_double_quant=method.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    # A folder belongs to no hub, so it has no revision.
    revision = None if Path(model_path).is_absolute() else spec.model.revision
    transformers.utils.logging.disable_progress_bar()
    with loading(model_path, WEIGHTS, revision):
        config = AutoConfig.from_pretrained(model_path, revision=revision)
        if config.model_type == "falcon":
            raise InputError(
                "model.name: Falcon cannot be trained on packed rows: its attention mixes the documents of a row"
            )
        kept = None
        if cache and method.kind == "qlora":
            kept = quantised.place(cache, model_path, revision, method, dtype, device)
        found = kept is not None and quantised.sound(kept, remove=ranks.rank() == 0)
        if found:
            options = {}  # They say themselves how they were quantised.
        model = AutoModelForCausalLM.from_pretrained(
            str(kept) if found else model_path,
            revision=None if found else revision,
            dtype=dtype,
            device_map={"": str(device)},
            attn_implementation="sdpa",
            **options,
        )
    model.config.use_cache = False
    if method.kind == "qlora":
        count = check_quantised(model, linear_names(config))
        before = " (kept from an earlier life)" if found else ""
        _say(f"base model: {count} linear layers quantised to {method.quant_type}{before}")
        for module in quantised_layers(model).values():
            # With it on, an evaluation repacks the weights for inference for good, and later training
            # gets no gradient through them.
            module.support_avx512bf16_for_cpu = False
        if found:
            model.config._name_or_path = model.name_or_path = model_path
        elif kept is not None and ranks.rank() == 0:
            quantised.keep(model, kept)
    else:
        _say(f"base model: not quantised, {str(dtype).removeprefix('torch.')}")
    return model  # type: ignore[no-any-return]


def _say(words: str) -> None:
    if ranks.rank() == 0:
        print(words, flush=True)


def linear_names(config: Any) -> set[str]:
    """Names of the linear layers a model of this config has, without the output head."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    head = skeleton.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    return {name for name, module in skeleton.named_modules() if isinstance(module, linear) and module is not head}


def quantised_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The 4-bit layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def check_quantised(model: torch.nn.Module, expected: set[str]) -> int:
    """How many layers are 4-bit; FtError unless these are exactly the expected ones, and some."""
    found = set(quantised_layers(model))
    if not found or found != expected:
        missing = sorted(expected - found)[:5]
        raise FtError(
            f"the base model was not quantised as it must be: {len(found)} of {len(expected)} linear layers are 4-bit"
            + (f"; not quantised: {', '.join(missing)} …" if missing else "")
        )
    return len(found)


def attach_adapter(model: PreTrainedModel, method: MethodSpec, seed: int) -> PeftModel:
    """`model` with a fresh, trainable fp32 LoRA adapter; its first weights come from `seed`."""
    if method.targets == "all-linear":
        targets: str | list[str] = "all-linear"
    else:
        names = {name.rsplit(".", 1)[-1] for name in linear_names(model.config)}
        wrong = [unknown("method.targets", target, names) for target in method.targets if target not in names]
        if wrong:
            raise InputError(wrong)
        targets = list(method.targets)
    transformers.set_seed(seed)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trainable and all(parameter.dtype is torch.float32 for parameter in trainable)
    total = sum(parameter.numel() for parameter in trainable)
    _say(f"adapter: rank {method.rank}, {total:,} trainable parameters")
    return adapted  # type: ignore[return-value]


def load_trained(spec: RunSpec, model_path: str, device: torch.device, checkpoint: Path) -> PeftModel:
    """The model as it was trained: the base as in training, with the adapter of `checkpoint`, ready to be judged."""
    model = attach_adapter(load_base(spec, model_path, device), spec.method, spec.train.seed)
    model.load_adapter(str(checkpoint), "default", is_trainable=False)
    return model.eval()
