"""Falcon's overrides: its attention reaches fused kernels, its cache stays small, and it computes what it computed."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="training needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from transformers.models.falcon import modeling_falcon  # noqa: E402

from ftlib.train import falcon  # noqa: E402
from tests.tiny_models import config  # noqa: E402

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "multi-query, as falcon-7b": {},
    "one layer after the other": {"parallel_attn": False},
    "alibi": {"alibi": True},
    "groups, as falcon-40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "a key head for each query head": {"multi_query": False},
}


def make(**changes: Any) -> Any:
    """A random tiny Falcon in float32, always of the same weights."""
    values = {key: value for key, value in config("tiny-falcon").items() if key not in ("architectures", "dtype")}
    transformers.set_seed(0)
    made = transformers.AutoConfig.for_model(**{**values, **changes})
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()


def packed() -> dict[str, Any]:
    """Two rows of 12 tokens: two documents in the first, one in the second."""
    ids = torch.arange(24).reshape(2, 12) + 10
    return {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(7)], [*range(12)]])}


@pytest.fixture
def key_heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(query heads, key heads) of each call of PyTorch's attention."""
    seen: list[tuple[int, int]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        assert key.shape == value.shape
        seen.append((query.shape[1], key.shape[1]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expanded_heads_compute_the_same_logits_and_gradients(
    architecture: str, key_heads: list[tuple[int, int]]
) -> None:
    """Within rounding: on a CPU the fused kernel sums in another order."""
    plain, fused = make(**ARCHITECTURES[architecture]), make(**ARCHITECTURES[architecture])
    if architecture != "alibi":  # It has no positions to be packed by.
        for model in (plain, fused):
            falcon.isolate_documents(model)
    falcon.fuse_attention(fused)
    inputs = packed() if architecture != "alibi" else {"input_ids": packed()["input_ids"]}
    expected = plain(**inputs, use_cache=False).logits
    del key_heads[:]
    found = fused(**inputs, use_cache=False).logits
    assert key_heads == [(4, 4)] * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for logits in (found, expected):
        logits.square().mean().backward()
    for (name, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_generation_keeps_one_key_head_in_its_cache(key_heads: list[tuple[int, int]]) -> None:
    """The heads are expanded after the cache, which would be 71 times as large otherwise."""
    plain, fused = make(), make()
    falcon.fuse_attention(fused)
    prompt = {"input_ids": torch.arange(10, 16)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    expected = plain.generate(**prompt, **options)
    del key_heads[:]
    found = fused.generate(**prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert set(key_heads) == {(4, 4)}
    assert {layer.keys.shape[1] for layer in found.past_key_values.layers} == {1}


def test_transformers_still_hands_falcon_fewer_key_heads(key_heads: list[tuple[int, int]]) -> None:
    """What ftlib.train.falcon.fuse_attention is for. If this fails, transformers expands the heads itself."""
    make()(**packed(), use_cache=False)
    assert key_heads == [(4, 1)] * 2


def test_falcon_still_has_a_linear_layer_of_its_own() -> None:
    """What make_quantizable is for; the name must exist, or replacing it does nothing."""
    assert issubclass(modeling_falcon.FalconLinear, torch.nn.Linear)
    falcon.make_quantizable()
    assert modeling_falcon.FalconLinear is torch.nn.Linear
    assert type(make().transformer.h[0].mlp.dense_h_to_4h) is torch.nn.Linear
