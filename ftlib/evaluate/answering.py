"""A model answers prompts and is asked how likely the right responses are to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList

from ftlib import modelfiles
from ftlib.data.tokenizing import Prompt, Tokenizer
from ftlib.stop import StopFlag

# Most logits held at once: 1 GiB in fp32.
LOGITS = 2**28


def load(
    model: str, *, device: str, dtype: str, revision: str | None = None, adapter: Path | None = None,
    added: tuple[Tokenizer, int] | None = None, expanded_key_heads: bool = True,
) -> Any:  # fmt: skip
    """A causal language model to evaluate: in `dtype` on a GPU, float32 on a CPU; InputError without its files.
    adapter: peft's. added: the tokenizer whose new tokens a base gets rows for, as in training, and their seed."""
    kind = torch.float32 if device == "cpu" else getattr(torch, dtype)
    transformers.utils.logging.disable_progress_bar()
    with modelfiles.loading(model, modelfiles.WEIGHTS, revision):
        # A model that one GPU does not hold is laid over those of the job.
        place = "auto" if device != "cpu" and torch.cuda.device_count() > 1 else {"": device}
        loaded = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=kind, device_map=place, trust_remote_code=False)
    if device != "cpu" and expanded_key_heads:
        from ftlib.train.falcon import fuse_attention

        fuse_attention(loaded)
    if added is not None:
        from ftlib.train.model import add_rows

        add_rows(loaded, *added)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    return loaded.eval()


class Answerer:
    """Greedy, batched generation with a model, and the nll of given responses."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, *, max_new_tokens: int, stop: StopFlag, prefix: Sequence[int] = ()
    ) -> None:
        """prefix: ids before every prompt, such as a soft prompt's or examples."""
        self.model, self.tokenizer, self.prefix = model, tokenizer, list(prefix)
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos, *(ends if isinstance(ends, list) else [ends])} - {None}
        # In the model's own place, or its sampling defaults would fill what ours leaves open.
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad,
            use_cache=True)

        def stopping(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            stop.check()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        self.stopping = StoppingCriteriaList([stopping])

    def _heads(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        # Where the prefix begins a text already, the prompt does not begin another.
        skip = len(self.tokenizer.bos) if self.prefix[:1] == self.tokenizer.bos else 0
        return [self.prefix + ids[skip:] for ids in self.tokenizer.prompts(prompts)]

    @torch.inference_mode()
    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The model's continuation of each prompt up to EOS, as text. Raises Interrupted between two tokens."""
        ids, mask = self._left_padded(self._heads(prompts))
        found = self.model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=self.stopping)
        return [self.tokenizer.text(row) for row in found[:, ids.shape[1] :].tolist()]

    def nll(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[float, int]]:
        """For each response, EOS included: the sum of -log p over its tokens (in nats), and their number."""
        heads, tails = self._heads(prompts), self.tokenizer.responses(responses)
        at_once = max(1, LOGITS // (max(map(len, tails)) * self.model.config.get_text_config().vocab_size))
        found: list[tuple[float, int]] = []
        for start in range(0, len(heads), at_once):
            found += self._nll(heads[start : start + at_once], tails[start : start + at_once])
        return found

    @torch.inference_mode()
    def _nll(self, heads: list[list[int]], tails: list[list[int]]) -> list[tuple[float, int]]:
        # Left padding puts every response at the end, so that logits of the prompts are never made.
        ids, mask = self._left_padded([head + tail for head, tail in zip(heads, tails, strict=True)])
        longest = max(map(len, tails))
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1, use_cache=False
        ).logits[:, -longest - 1 : -1]
        lengths = torch.tensor([len(tail) for tail in tails], device=ids.device)
        in_response = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
        # Before a short response may stand ids of a soft prompt, which have no logit.
        targets = ids[:, -longest:].masked_fill(~in_response, 0)
        # (batch, longest)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        sums = (losses.double() * in_response).sum(dim=1).tolist()
        return [(nll, len(tail)) for nll, tail in zip(sums, tails, strict=True)]

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both (batch, longest row)."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)
