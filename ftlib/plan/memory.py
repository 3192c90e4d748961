"""How much memory training and export need. Formulas, so estimates; each says where it is from."""

import math
from dataclasses import dataclass

from ftlib.plan import architectures, zero
from ftlib.plan.shapes import ModelShape
from ftlib.spec import RunSpec

GIB = 2**30
# CUDA context, cuBLAS workspaces and the allocator's fragmentation.
CUDA_RESERVED_GIB = 1.5
# QLoRA (arXiv 2305.14314), section 3: 0.5 bit per parameter for constants, 0.127 when they are quantised too.
NF4_BYTES = {False: (4 + 0.5) / 8, True: (4 + 0.127) / 8}
OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2}
ADAM_FP32_BYTES = 8
# Python with torch, transformers and bitsandbytes.
INTERPRETER_GIB = 3
# A shard of merged weights; held-out rows that an export compares, and logits of a batch of them. As ftlib/export has
# them, which may not be imported here; tests/test_export_plan.py compares.
SHARD_BYTES = 5_000_000_000
COMPARED_ROWS, COMPARED_LOGITS = 64, 2**28


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Parts of one GPU's memory in training, in GiB."""

    weights_gib: float
    trained_gib: float
    activations_gib: float

    @property
    def total_gib(self) -> float:
        return self.weights_gib + self.trained_gib + self.activations_gib + CUDA_RESERVED_GIB


def training(shape: ModelShape, spec: RunSpec, micro_batch: int, world_size: int = 1) -> GpuMemory:
    """What one of `world_size` GPUs holds while it trains on `micro_batch` rows of `seq_len` tokens."""
    method = spec.method
    activations = activation_bytes(shape, spec, micro_batch) / GIB
    if spec.zero.stage:
        held, state_bytes = zero.gpu_bytes(shape.params, spec, world_size)
        return GpuMemory(weights_gib=held / GIB, trained_gib=state_bytes / GIB, activations_gib=activations)
    linear_bytes = {4: NF4_BYTES[method.double_quant], 8: 1, 16: 2}[method.bits]
    weights = shape.linear_params * linear_bytes + shape.embedding_params * 2
    own = own_params(shape, spec)
    # fp32 weight and gradient of each trained parameter, and the optimizer's two moments.
    state = 4 + 4 + OPTIMIZER_BYTES.get(spec.optim.name, ADAM_FP32_BYTES)
    trained = (own + added_params(shape, spec)) * state / GIB
    # What is trained of the base itself lies in fp32 alone.
    weights_gib = max(0, weights - 2 * own) / GIB
    return GpuMemory(weights_gib=weights_gib, trained_gib=trained, activations_gib=activations)


def own_params(shape: ModelShape, spec: RunSpec) -> int:
    """How many of the base's own parameters are trained: all, the chosen layers', or none."""
    if spec.method.kind == "full":
        return shape.params
    if spec.method.kind != "freeze":
        return 0
    sizes = {name: parameter.size for parameter in shape.parameters for name in parameter.names}
    return sum(sizes[name] for name in architectures.select(spec.method.train_layers, sizes))


def added_params(shape: ModelShape, spec: RunSpec) -> int:
    """Parameters of adapters, soft prompt and new tokens."""
    method, rows = spec.method, len(spec.tokens.add) * (1 if shape.tied else 2)
    adapters = shape.lora_params(method.rank, method.targets) if method.adapts else 0
    return adapters + (rows + (method.prompt_tokens if method.prompted else 0)) * shape.hidden


def checkpoint_bytes(shape: ModelShape, spec: RunSpec) -> int:
    """A checkpoint's size: what is trained, in fp32, with the optimizer's two moments."""
    return 12 * (own_params(shape, spec) + added_params(shape, spec))


def activation_bytes(shape: ModelShape, spec: RunSpec, micro_batch: int) -> float:
    """Saved activations in bf16, one layer's working set, and the logits with their fp32 copy and gradient."""
    tokens = micro_batch * spec.data.seq_len
    h, i = shape.hidden, shape.intermediate
    # What a block saves for its backward pass: norm inputs, q k v, attention output, gate, up, their product,
    # and the adapters' dropped-out copies of their inputs.
    block = 2 * (8 * h + 4 * i + (4 * h + i if spec.method.dropout and spec.method.adapts else 0)) * tokens
    kept = 2 * h * tokens * shape.layers + block if spec.train.gradient_checkpointing else block * shape.layers
    logits = (2 + 4 + 4) * shape.vocab * tokens
    dequantised = 2 * max(p.size for p in shape.linears)
    return kept + logits + dequantised


def train_host_gib(shape: ModelShape, spec: RunSpec, *, nodes: int, per_node: int) -> float:
    """A node's memory in training: 16-bit weights on their way to the GPUs, what is offloaded, the interpreters."""
    return load_host_gib(shape) + 2 * per_node + zero.host_bytes(shape.params, spec, nodes) / GIB


def export_host_gib(shape: ModelShape, spec: RunSpec, *, on_gpu: bool) -> float:
    """Host memory of the export stage: the interpreter, and the largest of what it does one after another.

    The merge (ftlib/export/shards.py) holds one shard and four fp32 copies of the largest tensor, whatever the model's
    size, and the adapter. The comparison (ftlib/export/equality.py) holds logits, and on a CPU a model too: the trained
    one, then the merged one. ZeRO's shards are joined instead.
    """
    if spec.zero.stage:
        return zero.consolidation_bytes(shape.params, spec) * 1.1 / GIB + INTERPRETER_GIB
    dtype_bytes = 4 if spec.export.dtype == "float32" else 2
    shard = min(SHARD_BYTES, dtype_bytes * shape.params)
    largest = max(p.size for p in shape.parameters)
    merge = shard + 4 * 4 * largest + 4 * added_params(shape, spec) if spec.export.merged else 0
    # The reference's, the other's, and what is computed with them.
    comparison: float = 3 * 4 * _compared_logits(shape, spec)
    if not on_gpu:
        fp32_rest = 4 * (shape.params - shape.linear_params)
        trained = shape.linear_params * {4: NF4_BYTES[spec.method.double_quant], 8: 1, 16: 4}[spec.method.bits]
        comparison += max(trained + fp32_rest, dtype_bytes * shape.params) + 4 * added_params(shape, spec)
    return max(merge, comparison) / GIB + INTERPRETER_GIB


def export_gpu_gib(shape: ModelShape, spec: RunSpec) -> float:
    """GPU memory of the export stage where adapters are merged, in GiB: four fp32 copies of a tensor, then the trained
    model and after it the merged one, each with the activations of a forward pass. A merged model that is larger than
    the GPU is read from its files layer by layer (ftlib/export/run.py, load_merged); none of it is planned."""
    if spec.zero.stage:
        return 0.0
    largest = max(p.size for p in shape.parameters)
    rows = max(1, _compared_logits(shape, spec) // (shape.vocab * spec.data.seq_len))
    tokens = rows * spec.data.seq_len
    # One layer's working set, and logits with a copy while their real tokens are picked.
    forward = 2 * (8 * shape.hidden + 4 * shape.intermediate) * tokens + 2 * 2 * shape.vocab * tokens
    trained = training(shape, spec, 1).weights_gib * GIB + 4 * (own_params(shape, spec) + added_params(shape, spec))
    return max(4 * 4 * largest, trained + forward) / GIB + CUDA_RESERVED_GIB


def _compared_logits(shape: ModelShape, spec: RunSpec) -> int:
    """Logits of one batch of the export's comparison: at most COMPARED_LOGITS, but a row at least."""
    row = shape.vocab * spec.data.seq_len
    return max(row, min(COMPARED_LOGITS, COMPARED_ROWS * row))


def load_host_gib(shape: ModelShape) -> float:
    """Host memory to load the 16-bit weights on the way to the GPU, and the interpreter."""
    return 2 * shape.params * 1.25 / GIB + 3


def evaluation_gpus(shape: ModelShape, spec: RunSpec, gpu_memory_gib: float, at_most: int) -> int:
    """GPUs over which one process lays the 16-bit weights to generate with, a quarter being left for the cache."""
    needed = 2 * shape.params / GIB / 0.75
    return max(1, min(at_most, math.ceil(needed / (gpu_memory_gib - CUDA_RESERVED_GIB))))
