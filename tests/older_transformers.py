"""Which parts of training stand under another transformers than the lock's, in a process of its own: a line of JSON.

{"transformers", "imports": [modules], "models": {twin: loss}, "arguments": "" or why they could not be made}
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
import transformers

CHECKOUT = Path(__file__).resolve().parent.parent
MODULES = ("ftlib.train.run", "ftlib.export.run", "ftlib.evaluate.evaluate", "ftlib.evaluate.answering")
TWINS = {"tiny-llama3": "tiny-llama3", "tiny-falcon": "tiny-falcon"}


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    from ftlib import recipe
    from ftlib.train import methods
    from ftlib.train.model import load_base
    from jobs.wish import RECIPES

    losses = {}
    for name, folder in TWINS.items():
        changes = {"method.kind": "lora", "method.train_layers": []}
        spec = recipe.resolve(recipe.read(RECIPES, name), name, changes, None)
        path = str(CHECKOUT / "models" / folder)
        model = methods.attach(load_base(spec, path, torch.device("cpu")), spec, path)
        positions = torch.cat([torch.arange(16), torch.arange(16)])[None]
        tokens = positions + 5
        loss = model(input_ids=tokens, labels=tokens, position_ids=positions).loss
        losses[name] = round(float(loss), 4)
    refused = ""
    try:
        transformers.TrainingArguments(output_dir="unused", use_cpu=True, activation_checkpointing=True)
    except TypeError as error:
        refused = str(error)
    found = {"transformers": transformers.__version__, "imports": MODULES, "models": losses, "arguments": refused}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
