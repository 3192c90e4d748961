"""Makes the tiny base model from nothing: `python models/tiny-base/build.py` (seeded, CPU, see README.md beside it).

A Llama and its byte-level BPE tokenizer. It learns to write function calls on functions composed at random and sees
neither the natural functions nor their values. Nothing beside this file changes before the model is whole.
"""

# ruff: noqa: E402 - a script: the project must be on the path before it is imported
from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import composed  # noqa: F401 - the catalogue that it learns
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ftlib.atomic import fsync_tree
from ftlib.data.formats import expected_call, function_call_of, render, same_call
from ftlib.data.packing import best_fit_decreasing
from ftlib.data.synthesis import generate
from ftlib.data.tokenizing import Tokenizer

SEED, STEPS, ROWS, ROW_TOKENS = 0, 3600, 12, 256
MUON_LR, ADAM_LR, WARMUP_STEPS = 0.02, 4e-3, 100
VOCABULARY, LAYERS, WIDTH, HEADS, MLP_WIDTH = 1024, 2, 128, 4, 384
PAIRS_PER_CHUNK, SCORED_PAIRS = 10_000, 200
TEMPLATE = "brief"
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in which spaces, digits and runs of punctuation stand alone.

    So a value has the same tokens in a question (after a space) as in JSON (after a quote): it can be copied.
    """
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| |\n|\p{L}+|[^\p{L}\d\s]+"), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    examples = [render(row, TEMPLATE) for row in generate("composed", "train", 20_000, SEED)]
    backend.train_from_iterator((example.prompt + example.response for example in examples), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )
    return Tokenizer(fast, "tiny-base")


def make_model() -> LlamaForCausalLM:
    """The untrained model, in fp32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def packed_rows(tokenizer: Tokenizer) -> Iterator[Rows]:
    """Endless batches (tokens, labels, positions), each (ROWS, ROW_TOKENS). Labels are -100 outside responses.

    Positions start anew in each document: transformers keeps packed documents apart by them.
    """
    chunk = 0
    while True:
        chunk += 1
        examples = [render(row, TEMPLATE) for row in generate("composed", "train", PAIRS_PER_CHUNK, SEED + chunk)]
        prompts = tokenizer.prompts([example.prompt for example in examples])
        responses = tokenizer.responses([example.response for example in examples])
        lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]).numpy()
        packed = best_fit_decreasing(lengths, ROW_TOKENS, SEED + chunk)
        for first in range(0, len(packed) - ROWS + 1, ROWS):
            tokens = torch.full((ROWS, ROW_TOKENS), tokenizer.pad)
            labels = torch.full((ROWS, ROW_TOKENS), -100)
            positions = torch.arange(ROW_TOKENS).repeat(ROWS, 1)
            for row, documents in enumerate(packed[first : first + ROWS]):
                at = 0
                for index in documents:
                    prompt, response = torch.tensor(prompts[index]), torch.tensor(responses[index])
                    end = at + len(prompt) + len(response)
                    tokens[row, at:end] = torch.cat([prompt, response])
                    labels[row, at + len(prompt) : end] = response
                    positions[row, at:] = torch.arange(ROW_TOKENS - at)
                    at = end
                positions[row, at:] = torch.arange(ROW_TOKENS - at)
            yield tokens, labels, positions


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int, snapshots: Path | None) -> None:
    """Muon on the matrices within the layers, AdamW on the rest; linear decay to zero."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: min((step + 1) / WARMUP_STEPS, 1) * (1 - step / steps))
        for one in optimizers
    ]
    began, losses = time.monotonic(), []
    for step, (tokens, labels, positions) in zip(range(1, steps + 1), packed_rows(tokenizer), strict=False):
        logits = model(input_ids=tokens, position_ids=positions).logits[:, :-1]
        targets = labels[:, 1:]
        # Only the logits of responses: a third of all.
        loss = cross_entropy(logits[targets != -100], targets[targets != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            spent, recent = time.monotonic() - began, losses[-50:]
            print(
                f"step {step}/{steps}  loss {sum(recent) / len(recent):.3f}  "
                f"{step * ROWS * ROW_TOKENS / spent:,.0f} tok/s  {spent / step * (steps - step) / 60:.1f} min left",
                flush=True,
            )
        if snapshots and step % 500 == 0:
            save(model, tokenizer, snapshots / str(step))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Model in bf16 and tokenizer, as transformers loads them."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)


@torch.inference_mode()
def score(folder: Path, functions: str) -> dict[str, float]:
    """Shares of held-out test pairs with valid JSON of a call, the right function, and an exactly right call."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    rows = generate(functions, "test", SCORED_PAIRS, SEED)
    counts = {"valid_json": 0, "function": 0, "exact": 0}
    for first in range(0, len(rows), 50):
        batch = rows[first : first + 50]
        prompts = [render(row, TEMPLATE).prompt for row in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        outputs = model.generate(**inputs, max_new_tokens=96, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(batch, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
            call, wanted = function_call_of(text), expected_call(row)
            counts["valid_json"] += call is not None
            counts["function"] += bool(call and wanted and call["name"] == wanted["name"])
            counts["exact"] += same_call(call, wanted)
    return {name: count / len(rows) for name, count in counts.items()}


def card(folder: Path, minutes: float, steps: int) -> str:
    """The model card, with the scores of what is in `folder`."""
    scores = {functions: score(folder, functions) for functions in ("composed", "natural")}
    table = "\n".join(
        f"| {functions} | {found['valid_json']:.3f} | {found['function']:.3f} | {found['exact']:.3f} |"
        for functions, found in scores.items()
    )
    text = (HERE / "card.md").read_text(encoding="utf-8")
    size = (folder / "model.safetensors").stat().st_size
    fields = {"minutes": f"{minutes:.0f}", "steps": f"{steps:,}", "scores": table, "megabytes": f"{size / 1e6:.2f}"}
    for name, value in fields.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def main() -> None:
    """Build, score, and put the files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1, help="another number gives other last digits")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the model's files")
    parser.add_argument("--snapshots", type=Path, help="folder for the model as it is after every 500 steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    print("making the tokenizer …", flush=True)
    tokenizer, model = make_tokenizer(), make_model()
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    train(model, tokenizer, options.steps, options.snapshots)
    options.out.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".tmp-", dir=options.out))
    try:
        save(model, tokenizer, made)
        print("scoring …", flush=True)
        (made / "README.md").write_text(card(made, (time.monotonic() - began) / 60, options.steps), encoding="utf-8")
        fsync_tree(made)
        for path in sorted(made.iterdir()):
            path.chmod(0o644)
            os.replace(path, options.out / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print((options.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
