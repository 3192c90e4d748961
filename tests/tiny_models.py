"""Tiny models of every architecture for tests: the committed twins, and random ones of any config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.wishes import CHECKOUT

# The large model of a recipe, and the folder of the tiny one of its architecture.
TWINS = {
    "codellama-13b": "models/tiny-base",
    "llama-7b-alpaca": "models/tiny-base",
    "llama3-8b": "models/tiny-llama3",
    "falcon-7b": "models/tiny-falcon",
    "llama2-7b-full": "models/tiny-base",
    "llama2-70b-zero3": "models/tiny-base",
}


def config(name: str) -> dict[str, Any]:
    """A committed tiny model's config.json, by its folder's name."""
    found = json.loads((CHECKOUT / "models" / name / "config.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def write_model(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> None:
    """A random model like a committed one, its config changed, with that one's tokenizer; in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    values = {key: value for key, value in config(name).items() if key not in ("architectures", "dtype")}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**values, **changes})).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKOUT / "models" / name / file, folder)
