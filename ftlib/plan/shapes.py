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
    positions: int | None = None  # longest row it was made for, in tokens; None where its config does not tell
    quantized: str | None = None  # how its files are quantized, such as gptq; None where they are not

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
# Kinds of rotary scaling whose factor a config leaves for its reader to multiply.
SCALED_BY_FACTOR = ("linear", "dynamic", "yarn")


def from_config(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a transformers config.json describes; InputError names what it lacks."""
    sizes, tied = architectures.dimensions(config, where), architectures.flag(config, "tie_word_embeddings", where)
    return ModelShape(
        hidden=sizes["hidden"], intermediate=sizes["intermediate"], layers=config["num_hidden_layers"],
        vocab=sizes["vocab"], tied=tied, parameters=architectures.parameters(config, where),
        positions=_positions(config), quantized=_quantized(config))


def _positions(config: dict[str, Any]) -> int | None:
    """The longest row that a config's rotary positions reach. Llama 3's and longrope's scaling is in
    max_position_embeddings already; linear, dynamic and yarn scaling multiply what they began from."""
    positions = config.get("max_position_embeddings")
    if type(positions) is not int:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) not in SCALED_BY_FACTOR:
        return positions
    factor, began = scaling.get("factor") or 1, scaling.get("original_max_position_embeddings") or positions
    return max(positions, int(factor * began))


def _quantized(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else None
