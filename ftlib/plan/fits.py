"""Whether a method fits the model: what can be refused before a job is queued. No torch, no weights."""

import json
from pathlib import Path

from ftlib.plan import architectures
from ftlib.plan.shapes import ModelShape
from ftlib.spec import RunSpec

# Fields of method that other kinds would leave unused, in silence.
ONLY_FOR = {
    "train_layers": ("freeze",), "prompt_text": ("prompt", "two-stage"), "prompt_lr": ("two-stage",),
    "rslora": ("qlora", "lora", "two-stage"), "dora": ("qlora", "lora", "two-stage")}
# DeepSpeed shares out the state of these; others (bitsandbytes) keep theirs in blocks that a shard would cut.
ZERO_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# The kinds of a method that have weights of the base itself trained.
OWN = ("full", "freeze")


def problems(spec: RunSpec, shape: ModelShape) -> list[str]:
    """One line for each thing that does not fit, naming the field and what would; none when all does."""
    method, kind = spec.method, spec.method.kind
    found = [
        f"method.{name}: has no effect with method.kind={kind}; it is for {', '.join(kinds)}"
        for name, kinds in ONLY_FOR.items()
        if getattr(method, name) and kind not in kinds]
    if kind == "freeze" and not method.train_layers:
        found.append("method.train_layers: is missing; freeze trains these layers, such as [24-31, lm_head]")
    found += architectures.pattern_problems("method.train_layers", method.train_layers, shape.parameters)
    if method.adapts and method.targets != "all-linear":
        found += architectures.target_problems("method.targets", method.targets, shape.parameters)
    bits = {"qlora": (4,), "lora": (16, 8), "full": (16,), "freeze": (16,)}.get(kind, (16, 8, 4))
    if method.bits not in bits:
        found.append(f"method.base_bits: {method.bits} does not go with method.kind={kind}; allowed: {bits}"
                     + (" (4 bits: method.kind=qlora)" if kind == "lora" else ""))  # fmt: skip
    if kind == "prompt" and spec.export.merged:
        found.append("export.merged: a soft prompt has nothing to merge, its adapter is the export; leave it out")
    if kind in OWN and not spec.export.merged:
        found.append(f"export.merged: method.kind={kind} has no adapter, so the weights are the export; use true")
    if shape.quantized:
        found.append(
            f"model.name: {spec.model.name} is quantized already ({shape.quantized}), so its own weights are no longer "
            "there to train on, to merge into and to compare with. Name the 16-bit model that it was made from (its "
            "card says which); method.kind=qlora quantizes that to 4 bits itself")
    if spec.zero.stage:
        found += _zero_problems(spec)
    elif spec.tokens.add and not _trains_rows(spec, shape):
        found.append(
            f"tokens.add: method.kind={kind} would not train the new tokens' rows; use qlora, lora, full, or freeze "
            "with the embedding among method.train_layers")
    return found


def _zero_problems(spec: RunSpec) -> list[str]:
    field, kind = f"zero.stage: {spec.zero.stage}", spec.method.kind
    found = []
    if kind != "full":
        bits = f" on a {spec.method.bits}-bit base" if spec.method.bits < 16 else ""
        found.append(
            f"{field} is for method.kind=full; found {kind}{bits}, whose state is small: leave zero out and name the "
            "GPUs (resources.gpus_per_node, resources.nodes), each then holds a copy")
    if spec.optim.name not in ZERO_OPTIMIZERS:
        found.append(f"optim.name: {spec.optim.name} does not go with {field}; allowed: {', '.join(ZERO_OPTIMIZERS)}")
    if spec.tokens.add:
        found.append("tokens.add: no new rows are drawn where the embedding is shared out; leave zero out")
    return found


def start_problems(spec: RunSpec, shape: ModelShape, start: ModelShape | None, adapter: Path | None) -> list[str]:
    """Why model.init_from (weights of shape `start`, or else an adapter) does not fit; only headers are read."""
    field, method = f"model.init_from: {spec.model.init_from!r}", spec.method
    if start:
        expected, found = _own_shapes(shape), _own_shapes(start)
    elif method.kind not in ("qlora", "lora", "prompt"):
        return [f"{field} is an adapter; method.kind={method.kind} begins from merged weights"]
    else:
        assert adapter is not None
        try:
            with (adapter / "adapter_model.safetensors").open("rb") as file:
                tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError):
            return [f"{field}: {adapter}/adapter_model.safetensors is not there or no safetensors file"]
        rows = [name for name in tensors if "trainable_tokens" in name]
        if bool(rows) != bool(spec.tokens.add):
            return [f"{field} and this recipe differ in tokens.add: say the same new tokens"]
        found = {name: tuple(tensors[name]["shape"]) for name in tensors if name not in ("__metadata__", *rows)}
        expected = _adapter_shapes(spec, shape)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return [
        f"{field} does not fit {spec.model.name} with this method: {name} is {found.get(name, 'missing')}, needed "
        f"{expected.get(name, 'none')}"
        for name in wrong[:1]]


def _own_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Of all parameters but those that new tokens enlarge."""
    own = [p for p in shape.parameters if p.kind not in ("embedding", "head")]
    return {name: p.shape for p in own for name in p.names}


def _adapter_shapes(spec: RunSpec, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a peft adapter of this method."""
    method = spec.method
    if method.kind == "prompt":
        return {"prompt_embeddings": (method.prompt_tokens, shape.hidden)}
    found: dict[str, tuple[int, ...]] = {}
    for parameter in shape.adapted(method.targets):
        rows, columns = parameter.shape
        for name in parameter.names:
            place = f"base_model.model.{name.rpartition('.')[0]}"
            found |= {f"{place}.lora_A.weight": (method.rank, columns), f"{place}.lora_B.weight": (rows, method.rank)}
            found |= {f"{place}.lora_magnitude_vector": (rows,)} if method.dora else {}
    return found


def _trains_rows(spec: RunSpec, shape: ModelShape) -> bool:
    if spec.method.kind != "freeze":
        return spec.method.kind in ("qlora", "lora", "full")
    names = [p.name for p in shape.parameters if p.kind == "embedding"]
    return bool(architectures.select(spec.method.train_layers, names))
