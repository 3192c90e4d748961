"""What the layers of a decoder are called and how large they are, from its config.json: no torch, no weights.
Names and shapes come from a table, architectures.json, that `python models/make_architectures.py` takes from
transformers' own models. A shape in the table is made of `dimensions`, so one entry serves models of every size."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ftlib.errors import InputError, closest, unknown

TABLE = Path(__file__).with_name("architectures.json")
Kind = Literal["embedding", "linear", "norm", "head"]
BLOCK = "{i}"
_RANGE = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True)
class Parameter:
    """A parameter, or one that every block has: then `name` holds {i} and `copies` is the number of blocks."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    copies: int

    @property
    def size(self) -> int:
        """Single numbers in one copy."""
        return math.prod(self.shape)

    @property
    def layer(self) -> str:
        """Name of the layer (module) that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def names(self) -> list[str]:
        """Full names of all copies."""
        return [self.name.replace(BLOCK, str(i)) for i in range(self.copies)] if BLOCK in self.name else [self.name]


@cache
def table() -> dict[str, Any]:
    """The table: `families` by model_type, and `models`, the configs of models whose files need not be at hand."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def family(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The table's entry for a config (Llama's where it has no model_type); InputError names the known types."""
    kind, known = config.get("model_type", "llama"), table()["families"]
    if kind not in known:
        raise InputError(unknown(f"model.name: the layers of {where} are not known: model_type", kind, known))
    found: dict[str, Any] = known[kind]
    return found


def flag(config: dict[str, Any], name: str, where: str = "") -> bool:
    """A yes-or-no field of a config; where it is left out, transformers' default for the model's type."""
    value = config.get(name)
    return bool(family(config, where)["flags"].get(name, False) if value is None else value)


def dimensions(config: dict[str, Any], where: str) -> dict[str, int]:
    """The numbers that shapes are made of; InputError names what the config lacks."""
    falcon = config.get("model_type") == "falcon"
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    needed += [] if falcon else ["intermediate_size"]
    if missing := [key for key in needed if type(config.get(key)) is not int or config[key] < 1]:
        raise InputError(
            f"model.name: {where} describes a {config.get('model_type', 'model')!r} without {', '.join(missing)}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    intermediate = config.get("intermediate_size")
    if falcon:
        # A saved multi-query model may say num_kv_heads = num_attention_heads: transformers reads it in the newer
        # decoder alone.
        newer = flag(config, "new_decoder_architecture", where)
        shared = 1 if flag(config, "multi_query", where) else heads
        kv_heads = (config.get("num_kv_heads") or heads) if newer else shared
        intermediate = config.get("ffn_hidden_size") or 4 * hidden
    attention, kv = heads * head_dim, kv_heads * head_dim
    return {
        "hidden": hidden, "intermediate": intermediate, "vocab": config["vocab_size"], "attention": attention, "kv": kv,
        "qkv": attention + 2 * kv, "head_dim": head_dim}


def parameters(config: dict[str, Any], where: str) -> tuple[Parameter, ...]:
    """Every parameter of the model that a config describes, in its own order. A head that is tied is not among them.
    Raises InputError for an unknown model_type or a config that lacks a number."""
    entry, sizes = family(config, where), dimensions(config, where)
    return tuple(
        Parameter(row["name"], tuple(sizes[part] for part in row["shape"]), row["kind"],
                  config["num_hidden_layers"] if BLOCK in row["name"] else 1)
        for row in entry["parameters"]
        if all(flag(config, name, where) for name in row.get("if", ()))
        and not any(flag(config, name, where) for name in row.get("unless", ())))


def matches(pattern: str, name: str) -> bool:
    """Whether the dotted parts of `pattern` stand one after another in a parameter's `name`.
    A part is a word with * and ?, or an index or range of blocks: 31, 24-31. So "layers.31", "24-31.mlp", "q_proj",
    "lm_head" and "24-31" are patterns."""
    parts, words = pattern.split("."), name.split(".")
    return any(
        all(map(_part_matches, parts, words[start : start + len(parts)]))
        for start in range(len(words) - len(parts) + 1))


def select(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The parameter names that any of the patterns matches, in their order."""
    wanted = list(patterns)
    return [name for name in names if any(matches(pattern, name) for pattern in wanted)]


def pattern_problems(field: str, patterns: Sequence[str], found: Sequence[Parameter]) -> list[str]:
    """One line for each pattern that matches no parameter, with what would; none when all are good."""
    names = [name for parameter in found for name in parameter.names]
    blocks = max((parameter.copies for parameter in found), default=1)
    words = sorted({part for parameter in found for part in parameter.name.split(".")} - {BLOCK})
    problems = []
    for pattern in patterns:
        if select([pattern], names):
            continue
        parts = pattern.split(".")
        numbers = [part for part in parts if _RANGE.fullmatch(part)]
        strange = [part for part in parts if not select([part], names) and part not in numbers]
        near = [part if part in words or part in numbers else closest(part, words) or part for part in parts]
        hint = f" Did you mean {'.'.join(near)}?" if near != parts else ""
        why = f"; {', '.join(strange)} is no part of any" if strange else ""
        if any(int(part.split("-")[0]) >= blocks for part in numbers):
            why += f"; blocks are 0-{blocks - 1}"
        problems.append(
            f"{field}: {pattern!r} matches no parameter{why}. Parts of names: {', '.join(words)}.{hint} "
            "'make layers' prints them all")
    return problems


def target_problems(field: str, targets: Sequence[str], found: Sequence[Parameter]) -> list[str]:
    """One line for each adapter target that is the (last part of the) name of no linear layer."""
    layers = [parameter.layer for parameter in found if parameter.kind == "linear"]
    lasts = {layer.rpartition(".")[2] for layer in layers}
    return [unknown(field, target, lasts) for target in targets if not any(ends_with(one, target) for one in layers)]


def ends_with(layer: str, target: str) -> bool:
    """Whether the last dotted parts of a layer's name are an adapter's target."""
    return f".{layer}".endswith(f".{target}")


def _part_matches(part: str, word: str) -> bool:
    if _RANGE.fullmatch(part):
        first, _, last = part.partition("-")
        return word.isdigit() and int(first) <= int(word) <= int(last or first)
    return fnmatchcase(word, part)
