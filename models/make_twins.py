"""Makes the tiny twins of large models from nothing: `python models/make_twins.py` (seeded, seconds on a CPU).

Each has its large model's architecture and special tokens, two blocks, and random weights: recipes and tests train it
by the large model's method. The tokenizer is a byte-level BPE learned from the samples.
"""

# ruff: noqa: E402 - a script: the project must be on the path before it is imported
from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from ftlib.data import sources
from ftlib.data.formats import render
from ftlib.spec import DataSpec

VOCABULARY, POSITIONS = 448, 1024
SAMPLES = {"alpaca": "alpaca.jsonl", "guanaco": "oasst_trees.jsonl"}


def llama3(**tokens: int) -> PreTrainedConfig:
    """Llama 3's: grouped queries, a head of its own, a large rope base."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, rope_theta=500000.0, tie_word_embeddings=False,
        initializer_range=0.1, **tokens,
    )  # fmt: skip


def falcon(**tokens: int) -> PreTrainedConfig:
    """Falcon-7B's: one key and value for all heads, attention beside the MLP, a tied head, no biases."""
    return FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        parallel_attn=True, new_decoder_architecture=False, bias=False, alibi=False, max_position_embeddings=POSITIONS,
        initializer_range=0.1, **tokens,
    )  # fmt: skip


# Config, and the special tokens: (begin or none, end). Neither has one for padding.
TWINS = {
    "tiny-llama3": (llama3, ("<|begin_of_text|>", "<|end_of_text|>")),
    "tiny-falcon": (falcon, (None, "<|endoftext|>")),
}


def tokenizer(begin: str | None, end: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with these special tokens; `begin`, where there is one, stands before every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [token for token in (begin, end) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, special.index(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end, model_max_length=POSITIONS)


def texts() -> list[str]:
    """All samples as a model reads them."""
    found = []
    for template, name in SAMPLES.items():
        data = DataSpec(template=template, held_out=0.3)
        parts = sources.read(data, HERE.parent / "samples" / name, test_pairs=1)
        for row in parts.train:
            example = render(row, template)
            found.append("".join([*example.before, example.prompt, example.response]))
    return found


def main() -> None:
    """Write each twin into a folder beside this file."""
    for name, (config, (begin, end)) in TWINS.items():
        words = tokenizer(begin, end)
        ends = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id or words.eos_token_id}
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config(**ends), dtype=torch.bfloat16)
        model.save_pretrained(HERE / name)
        words.save_pretrained(HERE / name)
        for path in (HERE / name).iterdir():
            path.chmod(0o644)
        print(f"{name}: {model.num_parameters():,} parameters, {len(words)} tokens in the vocabulary")


if __name__ == "__main__":
    main()
