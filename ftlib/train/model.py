"""The base model, quantised for real, and its LoRA adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled as sharded
from transformers.pytorch_utils import Conv1D

from ftlib.data import tokenizing
from ftlib.errors import FtError, InputError, unknown
from ftlib.modelfiles import WEIGHTS, loading
from ftlib.plan.numerics import KernelSwitches
from ftlib.spec import MethodSpec, RunSpec
from ftlib.train import quantised, ranks
from ftlib.train.falcon import fuse_attention, isolate_documents, make_quantizable

AS_SHIPPED = KernelSwitches()


@dataclass(frozen=True, kw_only=True)
class BaseSource:
    """What `from_pretrained` is called with to load the base of a training."""

    path: str  # The model's files, or the folder where its 4-bit weights are kept.
    arguments: dict[str, Any]
    keep_at: Path | None  # Where the 4-bit weights are kept for the next attempt; None where that does not pay.
    was_kept: bool  # Whether `path` is that folder: the weights are then quantized already.


def base_source(
    spec: RunSpec, model_path: str, config: Any, device: torch.device, cache: Path | None, dtype: torch.dtype | None,
    switches: KernelSwitches = AS_SHIPPED,
) -> BaseSource:  # fmt: skip
    """Where the base of a training comes from and how it is loaded; config: the model's. Damaged 4-bit weights in
    `cache` are removed. The export reads the very same base, one tensor at a time (ftlib/export/base.py).
    dtype: as for load_base; a tensor is converted to it before anything else, such as quantizing it."""
    method, revision = spec.method, spec.model.revision
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.model_type == "falcon":
        make_quantizable()
    keep_at = None
    if cache and method.bits == 4:
        keep_at = quantised.place(cache, model_path, revision, method, dtype, device)
    was_kept = keep_at is not None and quantised.sound(keep_at, remove=ranks.rank() == 0)
    arguments: dict[str, Any] = {
        "revision": revision, "dtype": dtype, "attn_implementation": switches.attention,
        # ZeRO 3 places each shard itself.
        "device_map": None if sharded() else {"": str(device)}}
    # Kept weights say themselves how they were quantised.
    if method.bits < 16 and not was_kept:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=method.bits == 4, load_in_8bit=method.bits == 8, bnb_4bit_quant_type=method.quant_type,
            bnb_4bit_use_double_quant=method.double_quant, bnb_4bit_compute_dtype=torch.bfloat16)
    path = str(keep_at) if was_kept else model_path
    return BaseSource(path=path, arguments=arguments, keep_at=keep_at, was_kept=was_kept)


def load_base(
    spec: RunSpec, model_path: str, device: torch.device, cache: Path | None = None, *,
    dtype: torch.dtype | None = None, switches: KernelSwitches = AS_SHIPPED,
) -> PreTrainedModel:  # fmt: skip
    """The base on `device`: linear layers of method.bits, the rest in `dtype`. Attention is that of `switches`.
    It has rows for new tokens, and keeps a packed row's documents apart. cache: where 4-bit weights are kept, to the
    bit, for the next life. dtype: what the plan computes in; without one, bf16 on a GPU and fp32 on a CPU.
    InputError: files that are missing or cannot be read; FtError: a layer that was not quantised."""
    method, revision = spec.method, spec.model.revision
    if method.bits < 16 and not find_spec("bitsandbytes"):
        raise InputError(f"method: a {method.bits}-bit base needs bitsandbytes, which is not installed")
    transformers.utils.logging.disable_progress_bar()
    with loading(model_path, WEIGHTS, revision):
        config = AutoConfig.from_pretrained(model_path, revision=revision, trust_remote_code=False)
        source = base_source(spec, model_path, config, device, cache, dtype, switches)
        model = AutoModelForCausalLM.from_pretrained(source.path, **source.arguments, trust_remote_code=False)
    model.config.use_cache = False
    if method.bits < 16:
        count = check_quantised(model, linear_names(config))
        kind = method.quant_type if method.bits == 4 else "int8"
        before = " (kept from an earlier life)" if source.was_kept else ""
        ranks.say(f"base model: {count} linear layers quantised to {kind}{before}")
        for module in quantised_layers(model).values():
            # 4-bit: with it on, an evaluation repacks the weights for inference for good, and later training
            # gets no gradient through them.
            module.support_avx512bf16_for_cpu = False
        if source.was_kept:
            model.config._name_or_path = model.name_or_path = model_path
        elif source.keep_at is not None and ranks.rank() == 0:
            quantised.keep(model, source.keep_at)
    else:
        ranks.say(f"base model: not quantised, {str(source.arguments['dtype']).removeprefix('torch.')}")
    if spec.tokens.add:
        add_rows(model, tokenizing.load(model_path, revision, spec.tokens.add), spec.train.seed)
    isolate_documents(model)
    if switches.expanded_key_heads and source.arguments["dtype"] is not torch.float32:
        fuse_attention(model)
    return model


@torch.no_grad()
def add_rows(model: PreTrainedModel, tokenizer: tokenizing.Tokenizer, seed: int) -> None:
    """Embedding (and head) rows of the tokenizer's added tokens: near the mean of the others, drawn by `seed` alone."""
    if not tokenizer.added:
        return
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = list({id(layer.weight): layer.weight for layer in layers}.values())
    noises = added_noise(tokenizer, seed, [weight.shape[1] for weight in weights])
    for weight, noise in zip(weights, noises, strict=True):
        fill_added(weight, tokenizer, noise)


def added_noise(tokenizer: tokenizing.Tokenizer, seed: int, widths: Sequence[int]) -> list[torch.Tensor]:
    """For each layer with a row a token, what tells its added tokens' rows from each other: (added, width), fp32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(tokenizer.added), width, generator=generator) for width in widths]


@torch.no_grad()
def fill_added(weight: torch.Tensor, tokenizer: tokenizing.Tokenizer, noise: torch.Tensor) -> None:
    """Set the added tokens' rows of an embedding or head, `weight` (vocabulary, width), in place."""
    known = weight[: min(tokenizer.added)].float()
    rows = known.mean(0) + 0.1 * known.std(0) * noise.to(weight.device)
    weight[tokenizer.added] = rows.to(weight.dtype)


def linear_names(config: Any) -> set[str]:
    """Names of the linear layers a model of this config has, without the output head."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = skeleton.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    return {name for name, module in skeleton.named_modules() if isinstance(module, linear) and module is not head}


def quantised_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The 4-bit and 8-bit layers of a model by name."""
    if not find_spec("bitsandbytes"):
        return {}
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def check_quantised(model: torch.nn.Module, expected: set[str]) -> int:
    """How many layers are quantised; FtError unless these are exactly the expected ones, and some."""
    found = set(quantised_layers(model))
    if not found or found != expected:
        missing = ", ".join(sorted(expected - found)[:5])
        words = f"the base model was not quantised as it must be: {len(found)} of {len(expected)} linear layers are"
        raise FtError(words + f"; not quantised: {missing} …" * bool(missing))
    return len(found)


def attach_adapter(model: PreTrainedModel, method: MethodSpec, seed: int, tokens: Sequence[int] = ()) -> PeftModel:
    """`model` with a fresh, trainable fp32 LoRA adapter drawn by `seed`, in which the rows of `tokens` are trained."""
    targets = method.targets if method.targets == "all-linear" else list(method.targets)
    if targets != "all-linear":
        names = linear_names(model.config)
        lasts = {name.rsplit(".", 1)[-1] for name in names}
        absent = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
        if absent:
            raise InputError([unknown("method.targets", target, lasts) for target in absent])
    transformers.set_seed(seed)
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=targets,
        task_type="CAUSAL_LM", use_rslora=method.rslora, use_dora=method.dora,
        # A head that is not tied to the embedding has rows of its own.
        trainable_token_indices={name: list(tokens) for name in vocabulary_layers(model)} if tokens else None)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trainable and all(parameter.dtype is torch.float32 for parameter in trainable)
    ranks.say(f"adapter: rank {method.rank}, {sum(p.numel() for p in trainable):,} trainable parameters")
    return adapted


def vocabulary_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers with a row for each token: the embedding, and the head where it has its own weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if module is embedding or module is head}
    return [name.rsplit(".", 1)[-1] for name, m in found.items() if m is embedding or m.weight is not embedding.weight]
