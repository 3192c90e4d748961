"""The shape of a decoder-only model: what memory and time follow from. Taken from a config.json, never from weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.plan import architectures


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Dimensions of a decoder. All counts are of single parameters."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    tied: bool
    linears: tuple[tuple[int, int], ...]  # (in, out) of each linear layer of one block
    linear_names: tuple[str, ...]  # their names within the model, {i} being the block
    other_params: int  # norms, biases
    parameters: tuple[architectures.Parameter, ...] = ()

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
        """All parameters."""
        return self.linear_params + self.embedding_params + self.other_params

    @property
    def matmul_params(self) -> int:
        """Parameters that each token is multiplied with: linear layers and head."""
        return self.linear_params + self.vocab * self.hidden

    def lora_params(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Parameters of adapters of `rank` on the linear layers whose names end with a target."""
        wanted = [
            pair
            for name, pair in zip(self.linear_names, self.linears, strict=True)
            if isinstance(targets, str) or any(f".{name}".endswith(f".{target}") for target in targets)]
        return self.layers * rank * sum(a + b for a, b in wanted)


# config.json of models whose files need not be on the login node.
KNOWN: dict[str, dict[str, Any]] = architectures.table()["models"]


def from_config(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a transformers config.json describes; InputError names what it lacks."""
    found = architectures.parameters(config, where)
    matrices = [parameter for parameter in found if parameter.kind == "linear" and len(parameter.shape) == 2]
    large = {id(p) for p in matrices} | {id(p) for p in found if p.kind in ("embedding", "head")}
    sizes = architectures.dimensions(config, where)
    return ModelShape(
        hidden=sizes["hidden"], intermediate=sizes["intermediate"], layers=config["num_hidden_layers"],
        vocab=sizes["vocab"], tied=architectures.flag(config, "tie_word_embeddings", where),
        linears=tuple((parameter.shape[1], parameter.shape[0]) for parameter in matrices),
        linear_names=tuple(parameter.layer for parameter in matrices),
        other_params=sum(p.size * p.copies for p in found if id(p) not in large), parameters=found)
