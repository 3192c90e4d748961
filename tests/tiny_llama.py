"""A random Llama of two layers with a byte-level BPE tokenizer, and run folders around it, for tests of stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlib.data.formats import render
from ftlib.data.synthesis import generate
from ftlib.rundir import STAGES, RunDir
from ftlib.spec import file_digest
from tests.wishes import spec


def write_tokenizer(folder: Path, *, bos: bool = False) -> None:
    """A byte-level BPE tokenizer learned from generated pairs; with `bos`, it begins every text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    examples = [render(row, "brief") for row in generate("natural", "train", 200, 0)]
    tokenizer.train_from_iterator([example.prompt + example.response for example in examples], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_model(folder: Path, *, seed: int = 0) -> None:
    """The model, and its tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)


def write_run(folder: Path, model: Path, data: Path | None = None, **changes: Any) -> RunDir:
    """A run folder as submitting leaves it: the tiny recipe with changes, on a CPU with two threads."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    wish = spec(model__name=str(model), **changes)
    provenance = {
        "model_path": str(model),
        "cache": str(folder.parent / "cache"),
        "data_path": str(data) if data else None,
        "data_digest": file_digest(data) if data else "generated",
        "said": {"MODEL": "tiny", "SET": "data.limit=3 tracking.project='a b'"},
        "code": {"commit": "0123abc", "changed": False},
    }
    stage = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "device": "cpu"}
    batch = {"micro_batch": wish.train.micro_batch or 1, "threads": 2}
    batch["accumulation"] = wish.train.global_batch // batch["micro_batch"]
    plan = {"compute_dtype": "float32", "cluster": "local", "stages": dict.fromkeys(STAGES, stage), **batch}
    run.spec_file.write_text(wish.model_dump_json())
    run.provenance_file.write_text(json.dumps(provenance))
    run.plan_file.write_text(json.dumps(plan))
    return run
