"""The shape of a decoder-only model: what memory and time follow from. Taken from a config.json, never from weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftlib.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Dimensions of a Llama-like decoder. All counts are of single parameters."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear layer of one block: q, k, v, o, gate, up, down."""
        h, kv, i = self.hidden, self.hidden * self.kv_heads // self.heads, self.intermediate
        return ((h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h))

    @property
    def linear_params(self) -> int:
        """Parameters of all blocks' linear layers: what 4-bit quantisation reaches."""
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def embedding_params(self) -> int:
        """Embedding and, where it is a matrix of its own, head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """All parameters, norms left out."""
        return self.linear_params + self.embedding_params

    @property
    def matmul_params(self) -> int:
        """Parameters that each token is multiplied with: linear layers and head."""
        return self.linear_params + self.vocab * self.hidden

    def lora_params(self, rank: int) -> int:
        """Parameters of adapters of `rank` on every linear layer."""
        return self.layers * rank * sum(a + b for a, b in self.linears)


# config.json of models whose files need not be on the login node.
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}


def from_config(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a transformers config.json describes; InputError names what it lacks."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise InputError(
            f"model.name: {where} describes a {config.get('model_type', 'model')!r} without {', '.join(missing)}; "
            "Llama-like models are known"
        )
    return ModelShape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )
