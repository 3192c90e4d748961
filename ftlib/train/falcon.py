"""What transformers' Falcon does differently from other architectures, put right from outside. Each override is named
in tests/test_falcon.py, so that an upgrade of transformers that changes one fails there."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.falcon import modeling_falcon


def make_quantizable() -> None:
    """Let Falcon's linear layers be quantized: its own subclass of Linear is passed over. Call it before loading."""
    modeling_falcon.FalconLinear = torch.nn.Linear


def isolate_documents(model: PreTrainedModel) -> None:
    """Give Falcon the mask that others make of position ids: by itself the documents of a packed row see each other.
    Other architectures are left as they are."""
    if model.config.model_type != "falcon":
        return

    def mask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        positions = kwargs.get("position_ids")
        if positions is not None and kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
            document = (positions == 0).cumsum(dim=1)  # (rows, seq)
            same = document[:, :, None] == document[:, None, :]
            kwargs["attention_mask"] = same.tril()[:, None]
        return args, kwargs

    model.transformer.register_forward_pre_hook(mask, with_kwargs=True)


class _ExpandedHeads:
    """Stands between rotary embedding and attention, where transformers asks the cache of earlier tokens: passes what
    that gives, or the layer's own keys and values without one, as one view for each query head."""

    def __init__(self, cache: Any, query_heads: int) -> None:
        self._cache, self._query_heads = cache, query_heads

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value: (rows, 1, seq, head width), as the cache keeps them. Returns (rows, query heads, …) of each,
        which takes no memory: the heads share one storage."""
        if self._cache is not None:
            key, value = self._cache.update(key, value, layer)
        return key.expand(-1, self._query_heads, -1, -1), value.expand(-1, self._query_heads, -1, -1)


def fuse_attention(model: PreTrainedModel) -> None:
    """Let PyTorch's fused attention kernels serve a Falcon with one key head (falcon-7b: 71 query heads).
    They want as many key heads as query heads. transformers hands them one, and PyTorch falls back to the kernel that
    materializes the scores: (rows, 71, seq, seq), 2.2 GiB a layer for 8 rows of 1,024 tokens. In float32 on a CPU the
    fused kernel rounds differently, so callers leave that case as it always was."""
    if model.config.model_type != "falcon":
        return

    def expand(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["layer_past"] = _ExpandedHeads(kwargs.get("layer_past"), module.num_heads)
        return args, kwargs

    for module in model.modules():
        # In the newer decoder architecture transformers repeats the keys of each group itself.
        shares_keys = isinstance(module, modeling_falcon.FalconAttention) and module.multi_query
        if shares_keys and not module.new_decoder_architecture:
            module.register_forward_pre_hook(expand, with_kwargs=True)
