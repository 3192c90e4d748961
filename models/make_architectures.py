"""Makes architectures.json: `python models/make_architectures.py` (needs torch and transformers; no weights).

A small model of each type is built on the meta device once for every setting of the flags that change its layers.
From these follow each parameter's name, the dimensions its shape is made of, and the flags on which it depends.
Every known model is then built in its true size, and the table must give its names and shapes exactly.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ftlib import atomic
from ftlib.plan import architectures

Row = tuple[str, tuple[str, ...], str]

# Dimensions that all differ, so that a size tells which one it is.
PROBE = {
    "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 20,
    "intermediate_size": 112, "ffn_hidden_size": 112, "vocab_size": 130, "num_hidden_layers": 2,
}  # fmt: skip
FLAGS = {
    "llama": ("tie_word_embeddings", "attention_bias", "mlp_bias"),
    "mistral": ("tie_word_embeddings",),
    "qwen2": ("tie_word_embeddings",),
    "qwen3": ("tie_word_embeddings", "attention_bias"),
    "falcon": ("tie_word_embeddings", "bias", "parallel_attn", "new_decoder_architecture", "multi_query"),
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    } | more  # fmt: skip


# From each model's public config.json, what decides its shape and positions.
MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28672, 80, 64, num_key_value_heads=8),
    "meta-llama/Meta-Llama-3-8B": _llama(
        4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0
    ),
    "codellama/CodeLlama-13b-hf": _llama(
        5120, 13824, 40, 40, vocab_size=32016, max_position_embeddings=16384, rope_theta=1000000.0
    ),
    "huggyllama/llama-7b": _llama(4096, 11008, 32, 32, max_position_embeddings=2048, rms_norm_eps=1e-6),
    "tiiuae/falcon-7b": {
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
        "bias": False, "alibi": False, "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip


def main() -> None:
    """Write the table beside this file, once every known model agrees with it."""
    import transformers

    families = {kind: _family(kind, flags) for kind, flags in FLAGS.items()}
    made = {
        "made by": f"python models/make_architectures.py, transformers {transformers.__version__}",
        "families": families,
        "models": MODELS,
    }
    # One line a row: the table is read by people, too.
    text = json.dumps(made, indent=1)
    for entry in families.values():
        for row in entry["parameters"]:
            text = text.replace(json.dumps(row, indent=1).replace("\n", "\n    "), json.dumps(row))
    atomic.write_text(architectures.TABLE, text + "\n")
    architectures.table.cache_clear()
    for name, config in MODELS.items():
        found = architectures.parameters(config, name)
        ours = {full: parameter.shape for parameter in found for full in parameter.names}
        theirs = {full: shape for full, (shape, _) in built(config).items()}
        assert ours == theirs, f"{name}: {sorted(set(ours.items()) ^ set(theirs.items()))[:6]}"
        print(f"{name}: {sum(p.size * p.copies for p in found):,} parameters in {len(ours)} tensors, as transformers'")


def built(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind of every parameter of the model that transformers builds from a config, in its order."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    head, kinds = model.get_output_embeddings(), {torch.nn.Embedding: "embedding", torch.nn.Linear: "linear"}
    found = {}
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        kind = next((kind for type_, kind in kinds.items() if isinstance(layer, type_)), "norm")
        found[name] = tuple(parameter.shape), "head" if layer is head else kind
    return found


def _family(kind: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """A type's entry: its rows, each with the flags that must be on (if) or off (unless) for it to be there."""
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(kind)
    probe = {key: value for key, value in PROBE.items() if kind != "falcon" or key != "head_dim"}
    settings = [dict(zip(flags, values, strict=True)) for values in itertools.product((False, True), repeat=len(flags))]
    # Falcon's newer decoder is always parallel.
    settings = [s for s in settings if s.get("parallel_attn", True) or not s.get("new_decoder_architecture")]
    order: list[Row] = []
    there: dict[Row, list[dict[str, bool]]] = {}
    for setting in settings:
        at = 0
        for row in _rows({"model_type": kind, **probe, **setting}):
            if row not in there:
                order.insert(at, row)
            at = order.index(row) + 1
            there.setdefault(row, []).append(setting)
    rows = []
    for name, shape, kind_of_layer in order:
        found = there[name, shape, kind_of_layer]
        on = [flag for flag in flags if all(setting[flag] for setting in found)]
        off = [flag for flag in flags if not any(setting[flag] for setting in found)]
        assert found == [s for s in settings if all(s[f] for f in on) and not any(s[f] for f in off)], name
        entry = {"name": name, "shape": list(shape), "kind": kind_of_layer, "if": on, "unless": off}
        rows.append({key: value for key, value in entry.items() if value})
    return {"flags": {flag: bool(getattr(defaults, flag)) for flag in flags}, "parameters": rows}


def _rows(config: dict[str, Any]) -> Iterator[Row]:
    """(name with {i}, the shape's dimensions by name, kind), the blocks taken together."""
    # Of dimensions with one value the first name stands: in Falcon, attention is as wide as hidden.
    sizes: dict[int, str] = {}
    for name, size in architectures.dimensions(config, "probe").items():
        sizes.setdefault(size, name)
    for name, (shape, kind) in built(config).items():
        parts = [architectures.BLOCK if part.isdigit() else part for part in name.split(".")]
        if "0" in name.split(".") or architectures.BLOCK not in parts:
            yield ".".join(parts), tuple(sizes[size] for size in shape), kind


if __name__ == "__main__":
    main()
