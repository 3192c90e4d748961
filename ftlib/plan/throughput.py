"""How long stages take: the floor from FLOPs and peak, and a stated share of it."""

from ftlib.plan.memory import COMPARED_ROWS, own_params
from ftlib.plan.shapes import ModelShape
from ftlib.spec import RunSpec

# Share of the FLOP floor that an HF QLoRA loop reaches: 2,741 tok/s of 7,466 on an A100
# (Llama-2-7B, length 2,048, FlashAttention-2; Unsloth's published comparison). Not measured here.
ASSUMED_EFFICIENCY = 0.35
# One core of a server CPU on small matrices, and a step's fixed cost; `make bench` measures the tiny recipe.
CPU_FLOPS_PER_THREAD, CPU_STEP_S = 40e9, 0.03
# Where a profile does not give its GPU's: a T4's, the slowest that the locked packages run on.
LEAST_GPU_TFLOPS = 60.0
# What a node reads from and writes to a shared file system in a second, carefully.
READ_BYTES_PER_S, WRITE_BYTES_PER_S = 0.5e9, 0.5e9
# Published decoding speed of a 7B model in bf16 (NexusRaven's evaluation): batch steps a second.
DECODE_STEPS_PER_S_7B, PARAMS_7B = 31.0, 6.7e9
CPU_DECODE_STEPS_PER_S = 60.0


def flops_per_token(shape: ModelShape, spec: RunSpec) -> float:
    """Forward and activation gradient (2N each), recompute (2N more), and 2 for each weight of the base that is
    trained; attention 2·S·h·L a forward, twice that back."""
    recompute = 1 if spec.train.gradient_checkpointing else 0
    attention = 2 * spec.data.seq_len * shape.hidden * shape.layers
    own = min(shape.matmul_params, own_params(shape, spec))
    return 2 * (shape.matmul_params * (2 + recompute) + own) + attention * (3 + recompute)


def tokens_per_s(shape: ModelShape, spec: RunSpec, *, tflops: float | None, world_size: int, threads: int) -> float:
    """Estimated training speed over all GPUs, or over `threads` of one CPU where `tflops` is None."""
    if tflops is not None:
        return world_size * tflops * 1e12 * ASSUMED_EFFICIENCY / flops_per_token(shape, spec)
    step_tokens = spec.train.global_batch * spec.data.seq_len
    step_s = step_tokens * flops_per_token(shape, spec) / (threads * CPU_FLOPS_PER_THREAD) + CPU_STEP_S
    return step_tokens / step_s


def export_min(
    shape: ModelShape, spec: RunSpec, *, tflops: float | None, threads: int, validation_rows: float
) -> float:
    """Minutes to merge, write and compare the exported weights, on a GPU of `tflops` or on `threads` of a CPU.
    The comparison takes export.equality_minutes at most.

    The merge reads the base and writes the result; the comparison loads both, and lets the trained and the exported
    model read the same rows, and the trained base once more under the exported adapter. `validation_rows`: how many
    there are to compare, an estimate. ZeRO's shards are joined and compared as they are.
    """
    read_s, write_s = 2 * shape.params / READ_BYTES_PER_S, 2 * shape.params / WRITE_BYTES_PER_S
    if spec.zero.stage:  # fp32 masters are read and written, and the files are read again
        return (6 * read_s + 2 * write_s) / 60
    passes = 3 if spec.export.merged else 2
    tokens = passes * min(COMPARED_ROWS, max(1.0, validation_rows)) * spec.data.seq_len
    forward = 2 * shape.matmul_params + 2 * spec.data.seq_len * shape.hidden * shape.layers
    flops_per_s = tflops * 1e12 * ASSUMED_EFFICIENCY if tflops else threads * CPU_FLOPS_PER_THREAD
    files_s = 3 * read_s + write_s if spec.export.merged else read_s
    # One batch is compared in any case; more only within the budget.
    compared_s = min(tokens * forward / flops_per_s, 60 * spec.export.equality_minutes)
    return (files_s + compared_s) / 60


def evaluation_min(shape: ModelShape, spec: RunSpec, *, on_gpu: bool) -> float:
    """Minutes to generate every answer with two models (three with few_shot), each step a batch wide."""
    steps = -(-spec.evaluate.pairs // spec.evaluate.batch) * spec.evaluate.max_new_tokens
    steps *= 3 if spec.evaluate.few_shot else 2
    size = max(shape.params / PARAMS_7B, 0.01)
    speed = DECODE_STEPS_PER_S_7B / size if on_gpu else CPU_DECODE_STEPS_PER_S / max(1.0, size * 100)
    return steps / min(speed, 100.0) / 60
