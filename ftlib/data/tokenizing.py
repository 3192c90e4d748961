"""Text to token ids: a document is BOS (if the tokenizer adds one) + prompt + response + EOS, and so on for each turn.
Prompts and responses are encoded apart: the ids of a prompt at inference are exactly those in training."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ftlib import modelfiles
from ftlib.data.formats import CHATML_END, Example
from ftlib.errors import InputError

# A question, or one with earlier turns: prompt, response, prompt, …, the question.
Prompt = str | Sequence[str]


class Tokenizer:
    """The fast tokenizer of a base model (`hf`), without its truncation and padding. `bos`: ids before a text (one or
    none); `eos`, `pad`: single ids; `added`: ids of tokens that the base does not know."""

    def __init__(self, hf: Any, model: str, added: Sequence[int] = ()) -> None:
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None or hf.eos_token_id is None:
            lack = "fast tokenizer (tokenizer.json)" if backend is None else "end-of-text token (eos_token)"
            raise InputError(f"model.name: {model} has no {lack}; it cannot be tuned here")
        backend.no_truncation()
        backend.no_padding()
        self.hf, self._backend, self.added = hf, backend, list(added)
        self.eos: int = hf.eos_token_id
        self.pad: int = self.eos if hf.pad_token_id is None else hf.pad_token_id
        self.bos: list[int] = [hf.bos_token_id] if hf("a").input_ids[:1] == [hf.bos_token_id] else []

    def __len__(self) -> int:
        return len(self.hf)

    def digest(self) -> str:
        """sha256 over all that decides the ids of a text."""
        return hashlib.sha256(json.dumps([self._backend.to_str(), self.bos, self.eos, self.pad]).encode()).hexdigest()

    def prompts(self, texts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of prompts, ready for the model to continue."""
        return [tokens for tokens, _ in self.documents([[text] if isinstance(text, str) else text for text in texts])]

    def documents(self, documents: Sequence[Sequence[str]]) -> Iterator[tuple[list[int], list[int]]]:
        """For each document (prompt, response, prompt, …) its ids and, for each id, 1 in a response; EOS ends these."""
        encoded = iter(self.encode([text for texts in documents for text in texts]))
        for texts in documents:
            ids, targets = list(self.bos), [0] * len(self.bos)
            for turn, _ in enumerate(texts):
                added = next(encoded) + ([self.eos] if turn % 2 else [])
                ids += added
                targets += [turn % 2] * len(added)
            yield ids, targets

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of responses, EOS included."""
        return [[*ids, self.eos] for ids in self.encode(texts)]

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text up to ChatML's end mark, special tokens left out."""
        text = str(self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text.partition(CHATML_END)[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, nothing added."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def load(model: str, revision: str | None = None, add: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer in a folder or of a hub name, with new tokens; InputError says how to stage one."""
    hf, added = pretrained(model, revision, add)
    return Tokenizer(hf, model, added)


def pretrained(model: str, revision: str | None, add: Sequence[str]) -> tuple[Any, list[int]]:
    """transformers' tokenizer as it is saved, and the ids of those of `add` that it did not know."""
    from transformers import AddedToken, AutoTokenizer

    with modelfiles.loading(model, modelfiles.TOKENIZER, revision):
        hf = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    new = [token for token in dict.fromkeys(add) if token not in hf.get_vocab()]
    hf.add_tokens([AddedToken(token, normalized=False) for token in new])
    return hf, hf.convert_tokens_to_ids(new) if new else []


class Documents:
    """Encoded examples in flat arrays, those longer than `longest` tokens left out and counted.
    `targets` has, for each of `tokens`, 1 where it belongs to a response (EOS included) and 0 where to a prompt."""

    def __init__(self, longest: int) -> None:
        self.longest, self.dropped_too_long = longest, 0
        self.tokens, self.targets, self.lengths = array("I"), array("B"), array("I")

    def add(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[bool]:
        """Encode and append examples; for each, whether it was kept."""
        texts = [[*example.before, example.prompt, example.response] for example in examples]
        kept = []
        for tokens, targets in tokenizer.documents(texts):
            kept.append(len(tokens) <= self.longest)
            if kept[-1]:
                self.tokens.extend(tokens)
                self.targets.extend(targets)
                self.lengths.append(len(tokens))
        self.dropped_too_long += kept.count(False)
        return kept
