"""One training forward of every recipe and architecture in its true width, over tensors without data.

Fake tensors have shapes and dtypes and no values. So a forward of a 70B layer takes no memory, and whatever asks a
tensor for its value, which on a GPU waits for all that is queued there (.item(), .all() in an if, .tolist()), raises.
"""

from __future__ import annotations

from typing import Any

import pytest

from ftlib import recipe
from ftlib.plan import architectures
from ftlib.plan.shapes import KNOWN
from tests.tiny_models import TWINS
from tests.wishes import CHECKOUT, spec

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="training needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402

from ftlib.train import falcon  # noqa: E402

ROWS = 2
# The architectures that no recipe has, small; with fewer key heads than query heads.
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 448, "head_dim": 16}
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    kind: ({"model_type": kind, **SMALL}, 192) for kind in architectures.table()["families"] if kind != "falcon"
}
CONFIGS["falcon-40b"] = ({**KNOWN["tiiuae/falcon-7b"], "hidden_size": 8192, "num_attention_heads": 128}, 1024)
CONFIGS["falcon-40b"][0].update(new_decoder_architecture=True, num_kv_heads=8, multi_query=False)
for _name in recipe.names(CHECKOUT / "jobs" / "recipes"):
    _spec = spec(_name)
    if _spec.model.name in KNOWN:
        CONFIGS[_name] = (KNOWN[_spec.model.name], _spec.data.seq_len)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Shapes and dtypes of what each call of PyTorch's attention gets."""
    seen: list[dict[str, Any]] = []
    compute = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        assert key.shape == value.shape and query.dtype == key.dtype == value.dtype
        call = {"query": tuple(query.shape), "key": tuple(key.shape), "type": query.dtype}
        seen.append({**call, "mask": tuple(attn_mask.shape), "mask_type": attn_mask.dtype})
        return compute(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def test_every_recipe_of_a_large_model_is_looked_at() -> None:
    assert set(CONFIGS) > set(TWINS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_forward_reaches_fused_attention_and_never_waits_for_the_device(
    name: str, attention: list[dict[str, Any]]
) -> None:
    values, seq_len = CONFIGS[name]
    with FakeTensorMode():
        made = transformers.AutoConfig.for_model(**{**values, "num_hidden_layers": 1})
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa", dtype=torch.bfloat16)
        falcon.isolate_documents(model)
        falcon.fuse_attention(model)
        model.activation_checkpointing_enable({"use_reentrant": False})
        names = ("input_ids", "labels", "position_ids")  # a packed batch, as collate makes it
        batch = {name: torch.zeros(ROWS, seq_len, dtype=torch.long) for name in names}
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train()(**batch, use_cache=False, num_items_in_batch=torch.tensor(7))
        output.loss.backward()
        with pytest.raises(DataDependentOutputException):
            output.loss.item()  # so that what is claimed above is so
    assert attention, "attention is not sdpa"
    for call in attention:
        assert call["query"][1] == call["key"][1], "no fused kernel takes fewer key heads beside a mask"
        assert call["mask_type"] in (torch.bool, torch.bfloat16), "no fused kernel takes this mask"
        assert call["mask"][0] == ROWS and call["mask"][-2:] == (seq_len, seq_len)
        assert call["type"] is torch.bfloat16
        # FlashAttention 2's and memory-efficient attention's limit for the width of a head.
        assert call["query"][-1] <= 256 and call["query"][-1] % 8 == 0
