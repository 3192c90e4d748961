"""ZeRO (arXiv 1910.02054, section 5): DeepSpeed's configuration and each GPU's memory, from spec and plan. Pure."""

from typing import Any

from ftlib.spec import RunSpec

# Elements reduced or gathered at once: 100 MB in bf16, where a network is at full speed.
BUCKET = 50_000_000
# Stage 3: elements of gathered weights that may lie about at once.
LIVE = 500_000_000
# fp32 master weight and two moments; fp32 gradient (bf16 would lose small ones while they are accumulated).
MASTER_BYTES, GRADIENT_BYTES = 12, 4


def config(spec: RunSpec, *, micro_batch: int, accumulation: int, world_size: int, on_gpu: bool,
           compute_dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration for one training. Keys as in https://www.deepspeed.ai/docs/config-json."""
    zero: dict[str, Any] = {
        "stage": spec.zero.stage, "contiguous_gradients": True, "overlap_comm": on_gpu, "reduce_bucket_size": BUCKET}
    if spec.zero.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET}
        zero |= {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE}
    else:
        zero |= {"allgather_bucket_size": BUCKET}
    if spec.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": micro_batch * accumulation * world_size, "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation, "gradient_clipping": spec.optim.max_grad_norm,
        "bf16": {"enabled": compute_dtype == "bfloat16"}, "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # torch's own fused AdamW, on the CPU too: it needs no compiler on the nodes.
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 1_000_000_000}


def gpu_bytes(params: int, spec: RunSpec, world_size: int) -> tuple[float, float]:
    """(bf16 weights and buckets, fp32 state) on each GPU, in bytes."""
    stage, share = spec.zero.stage, params / world_size
    weights = 2 * (share + min(params, LIVE)) if stage == 3 else 2.0 * params
    # Two buckets of bf16, and fp32 copies of them while a reduction overlaps the next.
    buckets = 2 * (2 + 4) * min(BUCKET, params)
    offloaded = spec.zero.offload == "cpu"
    gradients = 2.0 * params if stage == 1 else 0.0
    if not offloaded:
        gradients += GRADIENT_BYTES * (params if stage == 1 else share)
    return weights + buckets, gradients + (0 if offloaded else MASTER_BYTES * share)


def host_bytes(params: int, spec: RunSpec, nodes: int) -> float:
    """What the offloaded state takes of each node's memory, in bytes."""
    return (MASTER_BYTES + GRADIENT_BYTES) * params / nodes if spec.zero.offload == "cpu" else 0.0


def consolidation_bytes(params: int, spec: RunSpec) -> float:
    """Host memory to put the shards together again, in bytes, beside the page cache of the files, which are mapped.
    Stage 3 is gathered tensor by tensor and written 5 GB at a time; of 1 and 2 DeepSpeed joins the whole in fp32."""
    return 2 * min(4.0 * params, 10e9) + (0.0 if spec.zero.stage == 3 else 4.0 * params)
