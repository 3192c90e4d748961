"""Ways to compute a Llama model that runs do not have yet: Liger's kernels, and varlen attention for packed rows.

Both are measured here before they are built in. Neither changes what is computed, but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from benchmarks.gpu_check.basics import varlen
from benchmarks.gpu_check.results import Skip

VARLEN = "gpu_check_varlen"


def apply_liger(model: PreTrainedModel) -> None:
    """Liger's norm, rotary embedding, SwiGLU and loss in place of Llama's. Skip where they cannot run."""
    if model.device.type != "cuda":
        raise Skip("Liger's kernels run on a GPU alone")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise Skip(f"liger-kernel cannot be imported: {error}") from None
    apply_liger_kernel_to_llama(model=model)


def apply_varlen(model: PreTrainedModel) -> None:
    """Attention within each document alone: no mask, and no work across documents. Where documents start is taken
    from the position ids of each batch. On a CPU, which has no such kernel, each document is attended to by itself:
    slow, and the same."""
    bounds: dict[str, Any] = {}

    def note_bounds(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs["position_ids"]  # (rows, seq): each document, and the padding, begins at 0
        starts = (positions.reshape(-1) == 0).nonzero()[:, 0]
        ends = torch.cat([starts[1:], starts.new_tensor([positions.numel()])])
        bounds["starts"] = torch.cat([starts, ends[-1:]]).to(torch.int32)  # (documents + 1,)
        bounds["longest"] = int((ends - starts).max())

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        scaling: float | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:
        rows, heads, length, width = query.shape
        # All rows one after another: (tokens, heads, width).
        flat = [tensor.transpose(1, 2).reshape(rows * length, tensor.shape[1], width) for tensor in (query, key, value)]
        output = attend(*flat, bounds=bounds["starts"], longest=bounds["longest"], scale=scaling)
        return output.reshape(rows, length, heads, width), None

    attend: Any = by_document
    if model.device.type == "cuda":
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            raise Skip(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None

        def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
            # Without autocast here, the fp32 that a norm leaves behind would be refused.
            half = [tensor.to(torch.bfloat16) for tensor in tensors]
            return varlen(varlen_attn, *half, **options)

    AttentionInterface.register(VARLEN, attention)
    model.config._attn_implementation = VARLEN
    model.register_forward_pre_hook(note_bounds, with_kwargs=True)


def by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, bounds: torch.Tensor, longest: int,
    scale: float | None,
) -> torch.Tensor:
    """The same by torch's ordinary attention, one document after another. All of shape (tokens, heads, width)."""
    pieces = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        document = [tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        output = functional.scaled_dot_product_attention(*document, is_causal=True, scale=scale, enable_gqa=True)
        pieces.append(output[0].transpose(0, 1))
    return torch.cat(pieces)
