"""Models of large recipes' true shape with random weights, made on the device layer by layer: no file is read.

A 7B model in bf16 is 13 GB; only one of its matrices is ever there unquantised.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

SPREAD = 0.02  # standard deviation of Llama's initial weights
# A dry run's shape, under a large one's name.
TINY = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512}


def config_of(name: str, *, dry: bool) -> dict[str, Any]:
    """config.json of a model by its name on the hub, as the planner knows it; in a dry run with tiny sizes."""
    from ftlib.plan.shapes import KNOWN

    return {**KNOWN[name], **(TINY if dry else {})}


def quantised_model(
    config: dict[str, Any], device: torch.device, *, quant_type: str = "nf4", double_quant: bool = True
) -> PreTrainedModel:
    """A causal language model of `config`, as training loads a 4-bit base: linear layers in 4 bit, embedding, norms
    and head in bf16 on a GPU and fp32 on a CPU. Weights are drawn from seed 0."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device=device).manual_seed(0)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            replaced = _linear(module, device, dtype, generator, quant_type, double_quant)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced)
    _fill_the_rest(model, device, dtype, generator)
    model.config.use_cache = False
    # As transformers marks a model that it quantised: peft and the Trainer ask.
    model.is_loaded_in_4bit = model.is_quantized = True
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16)
    model.config.quantization_config = quantization
    model.quantization_method = quantization.quant_method
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    return model


def _linear(
    module: torch.nn.Linear, device: torch.device, dtype: torch.dtype, generator: torch.Generator, quant_type: str,
    double_quant: bool,
) -> Linear4bit:
    """A 4-bit layer of the shape of `module`, its weight made and quantised on `device`."""
    if module.bias is not None:
        raise ValueError("layers with a bias are not made here")
    layer = Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
        compress_statistics=double_quant, quant_type=quant_type, device="meta")
    weight = _drawn(module.weight.shape, device, dtype, generator)
    # Params4bit.to quantises what is not quantised yet.
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type=quant_type, module=layer).to(device)
    layer.support_avx512bf16_for_cpu = False  # as in ftlib/train/model.py
    return layer


def _fill_the_rest(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Embedding and head drawn, norms of ones, and the buffers (rotary frequencies) computed anew."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                ones = torch.ones(parameter.shape, device=device, dtype=dtype)
                values = ones if parameter.dim() == 1 else _drawn(parameter.shape, device, dtype, generator)
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
        if any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            # Of Llama's modules only the rotary embedding has buffers; it makes them of the config.
            with torch.device(device):
                buffers = dict(type(module)(config=model.config).named_buffers(recurse=False))
            for name, buffer in buffers.items():
                module.register_buffer(name, buffer, persistent=False)
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ValueError(f"not filled: {left[:5]}")


def _drawn(
    shape: torch.Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, SPREAD, generator=generator)
