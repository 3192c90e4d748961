"""The image's own test: every dependency loads in its locked version, and two steps of a tiny model train."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# What the project imports by name; the rest of the lock comes with these.
MODULES = (
    "submitit", "pydantic", "yaml", "rich", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets",
    "wandb", "gguf", "deepspeed", "tokenizers", "safetensors",
)  # fmt: skip


def versions() -> int:
    """Compare what is installed with the locks; returns how many packages were compared."""
    pinned = {}
    for lock in sorted(Path(__file__).with_name("lock").iterdir()):
        for line in re.findall(r"^[A-Za-z0-9][^\\\n]*==[^\\\n]*", lock.read_text(), re.MULTILINE):
            said = Requirement(line)
            if said.marker is None or said.marker.evaluate():
                pinned[said.name] = str(said.specifier).removeprefix("==")
    # torch may carry a local version, such as +cpu.
    wrong = {name: wanted for name, wanted in pinned.items() if metadata.version(name).split("+")[0] != wanted}
    assert not wrong, f"not the locked versions: {wrong}"
    return len(pinned)


def train() -> float:
    """Two LoRA steps through the Trainer; returns the last loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (4, 16))]
    with tempfile.TemporaryDirectory() as folder:
        wanted = TrainingArguments(folder, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none")
        done = Trainer(model=model, args=wanted, train_dataset=rows).train()
    assert done.global_step == 2 and done.training_loss > 0, done
    return float(done.training_loss)


def main() -> None:
    os.environ.update(DS_ACCELERATOR="cpu", WANDB_MODE="disabled", HF_HUB_OFFLINE="1")
    count = versions()
    for name in MODULES:
        importlib.import_module(name)
    loss = train()
    try:
        importlib.import_module("deepspeed.ops.adam.cpu_adam_op")
        adam = "built ahead"
    except ImportError:
        adam = "not built (no compiler)"
    print(f"image test: {count} packages as locked, 2 steps trained (loss {loss:.2f}), CPU optimizer {adam}")


if __name__ == "__main__":
    main()
