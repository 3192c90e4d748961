"""The shape of a decoder-only model: what memory and time follow from. Taken from a config.json, never from weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.plan import architectures
from ftlib.plan.architectures import Parameter, ends_with


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Dimensions of a decoder. All counts are of single parameters."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    tied: bool
    parameters: tuple[Parameter, ...]

    @property
    def linears(self) -> list[Parameter]:
        """The (out, in) matrices of the blocks' linear layers."""
        return [p for p in self.parameters if p.kind == "linear" and len(p.shape) == 2]

    @property
    def linear_params(self) -> int:
        """Parameters of all blocks' linear layers: what 4-bit quantisation reaches."""
        return sum(p.size * p.copies for p in self.linears)

    @property
    def embedding_params(self) -> int:
        """Embedding and, where it is a matrix of its own, head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """All parameters."""
        return sum(p.size * p.copies for p in self.parameters)

    @property
    def matmul_params(self) -> int:
        """Parameters that each token is multiplied with: linear layers and head."""
        return self.linear_params + self.vocab * self.hidden

    def adapted(self, targets: str | Sequence[str] = "all-linear") -> list[Parameter]:
        """The matrices with an adapter: those of layers whose names end with a target."""
        return [p for p in self.linears if isinstance(targets, str) or any(ends_with(p.layer, one) for one in targets)]

    def lora_params(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Parameters of adapters of `rank` on the linear layers whose names end with a target."""
        return rank * sum(sum(p.shape) * p.copies for p in self.adapted(targets))


# config.json of models whose files need not be on the login node.
KNOWN: dict[str, dict[str, Any]] = architectures.table()["models"]


def from_config(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a transformers config.json describes; InputError names what it lacks."""
    sizes, tied = architectures.dimensions(config, where), architectures.flag(config, "tie_word_embeddings", where)
    return ModelShape(
        hidden=sizes["hidden"], intermediate=sizes["intermediate"], layers=config["num_hidden_layers"],
        vocab=sizes["vocab"], tied=tied, parameters=architectures.parameters(config, where))
