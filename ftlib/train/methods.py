"""What is trained, by method: put onto the base, switched between stages, saved into checkpoints and loaded again."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, PeftModelForCausalLM, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ftlib.data import tokenizing
from ftlib.errors import FtError
from ftlib.plan import architectures
from ftlib.plan.numerics import KernelSwitches
from ftlib.spec import MethodSpec, RunSpec
from ftlib.train import ranks
from ftlib.train.model import AS_SHIPPED, attach_adapter, load_base

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TRAINED = "trained.safetensors"  # full and freeze: the trained weights, fp32
PROMPT = "prompt"  # two-stage: the soft prompt's folder beside the adapter's files
_INNER = "ftlib_inner"


def attach(base: PreTrainedModel, spec: RunSpec, model_path: str) -> torch.nn.Module:
    """`base` with what the method trains on it, in fp32 and requiring gradients; new weights come from train.seed."""
    method, seed = spec.method, spec.train.seed
    tokens = tokenizing.load(model_path, spec.model.revision, spec.tokens.add).added if spec.tokens.add else []
    if method.kind in ("qlora", "lora"):
        return attach_adapter(base, method, seed, tokens)
    if method.kind == "prompt":
        return _prompt(base, method, model_path, seed)
    if method.kind == "two-stage":
        inner = attach_adapter(base, method, seed, tokens)
        model = _prompt(inner.get_base_model(), method, model_path, seed)
        # In a tuple it is no submodule: its weights are already the base's.
        setattr(model, _INNER, (inner,))
        enter_stage(model, prompt=True, adapter=True)
        return model
    names = [name for name, _ in base.named_parameters()]
    chosen = set(names if method.kind == "full" else architectures.select(method.train_layers, names))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen and not spec.zero.stage:  # DeepSpeed keeps fp32 masters of its own.
            parameter.data = parameter.data.float()
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in base.named_parameters()}
    if not chosen:
        raise FtError(f"method.train_layers: {', '.join(method.train_layers)} matches none of the model's weights")
    trained = sum(sizes[name] for name in chosen)
    ranks.say(f"{method.kind}: {trained:,} of {sum(sizes.values()):,} parameters are trained")
    return base


def _prompt(base: PreTrainedModel, method: MethodSpec, model_path: str, seed: int) -> PeftModel:
    transformers.set_seed(seed)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=method.prompt_tokens,
        prompt_tuning_init="TEXT" if method.prompt_text else "SAMPLE_VOCAB", prompt_tuning_init_text=method.prompt_text,
        tokenizer_name_or_path=model_path if method.prompt_text else None)
    ranks.say(f"soft prompt: {method.prompt_tokens} tokens")
    # get_peft_model would warn of two-stage's adapter inside, which is meant.
    return PeftModelForCausalLM(base, config)


def parts(model: torch.nn.Module, folder: Path) -> list[tuple[PeftModel, Path]]:
    """The peft models of a tuned model, and where in `folder` each has its files; none for plain weights."""
    if not isinstance(model, PeftModel):
        return []
    inner = getattr(model, _INNER, None)
    return [(inner[0], folder), (model, folder / PROMPT)] if inner else [(model, folder)]


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write what is trained into a checkpoint."""
    for part, place in parts(model, folder):
        # Without the look-up on the hub whether the base has these embeddings: rows that we train are saved anyway.
        part.save_pretrained(str(place), save_embedding_layers=False)
    if not isinstance(model, PeftModel):
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / TRAINED, metadata={"format": "pt"})


def load(model: torch.nn.Module, folder: Path, *, trainable: bool) -> None:
    """Put what `save` wrote back into a model that `attach` made in the same way."""
    for part, place in parts(model, folder):
        part.load_adapter(str(place), "default", is_trainable=trainable)
    if not isinstance(model, PeftModel):
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        saved = load_file(folder / TRAINED)
        if own.keys() != saved.keys():
            odd = sorted(own.keys() ^ saved.keys())[:5]
            raise FtError(f"{folder / TRAINED} holds other weights than are trained: {odd}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])


def enter_stage(model: Any, *, prompt: bool, adapter: bool) -> None:
    """Of a two-stage model, which of the two is trained now: what is not gets no gradient, and no update."""
    own = {id(parameter) for parameter in model.prompt_encoder.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            parameter.requires_grad_(prompt)
        elif "lora_" in name or "trainable_tokens_delta" in name:
            parameter.requires_grad_(adapter)


def load_trained(
    spec: RunSpec, model_path: str, device: torch.device, checkpoint: Path, cache: Path | None = None, *,
    dtype: torch.dtype | None = None, switches: KernelSwitches = AS_SHIPPED,
) -> torch.nn.Module:  # fmt: skip
    """The model as it was trained: the base as in training with what `checkpoint` holds, ready to be judged.
    cache: where training keeps 4-bit weights. dtype: what the training computed in, as for load_base."""
    base = load_base(spec, model_path, device, cache, dtype=dtype, switches=switches)
    model = attach(base, spec, model_path)
    load(model, checkpoint, trainable=False)
    return model.eval()


class _WithPrompt(torch.nn.Module):
    """Input embeddings in which the soft prompt's rows have the ids after the vocabulary's last."""

    def __init__(self, embedding: torch.nn.Embedding, rows: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.first = embedding, embedding.weight.shape[0]
        self.register_buffer("rows", rows.to(embedding.weight))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = ids >= self.first
        found = self.embedding(ids.masked_fill(own, 0))
        return torch.where(own[..., None], self.rows[(ids - self.first).clamp(min=0)], found)


def put_prompt(model: Any, folder: Path) -> list[int]:
    """Give `model` the soft prompt in `folder` (peft's files) as tokens; returns their ids, to stand before a text.
    So they have positions and masks like all others: peft itself drops the position ids of a padded batch."""
    embedding = model.get_input_embeddings()
    rows, first = load_file(folder / ADAPTER[1])["prompt_embeddings"], embedding.weight.shape[0]
    model.set_input_embeddings(_WithPrompt(embedding, rows))
    return list(range(first, first + len(rows)))
