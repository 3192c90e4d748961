"""The evaluate stage: base and tuned model answer held-out questions, and are scored beside copying the example.
Each answer goes to <run>/evaluation/<model>.jsonl, {"index", "answer", "nll", "tokens"}, where a next life goes on."""

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ftlib import atomic
from ftlib.data import packing, tokenizing
from ftlib.errors import InputError
from ftlib.evaluate import scoring
from ftlib.evaluate.agreement import require_validation_loss
from ftlib.rundir import RunDir
from ftlib.runs import events
from ftlib.stop import StopFlag

SAMPLES = 3
TINY = 20_000_000
HELD_OUT = "held-out"
# One event shows that an attempt made progress; an event per batch would make thousands of them.
PROGRESS_EVENT_S = 30.0


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str
    path: str
    adapter: Path | None = None
    prompt: Path | None = None  # a soft prompt
    shots: int = 0  # training examples before each question
    is_base: bool = True


def evaluate(run: RunDir, stop: StopFlag, attempt: int = 1) -> dict[str, Any]:
    """Score the run's models; returns what evaluation.json then holds. Raises InputError (missing files),
    Interrupted."""
    spec, provenance = run.spec(), run.provenance()
    answered = _Progress(run, attempt)
    folder = run.path / "evaluation"
    folder.mkdir(exist_ok=True)
    questions = _questions(Path(run.prepared()["dataset"]) / "test.jsonl", spec.evaluate.pairs)
    tokenizer = tokenizing.load(provenance["model_path"], spec.model.revision, spec.tokens.add)
    batches = _batches(questions, tokenizer, spec.evaluate.batch)
    # Without a call to score, a few answers are shown and the rest is perplexity.
    speaking = {i for i, question in questions.items() if question["expected_call"]} or set(list(questions)[:SAMPLES])
    answers: dict[str, dict[int, Any]] = {}
    for subject in _subjects(run):
        store = folder / f"{subject.name}.jsonl"
        answers[subject.name] = read_answers(store)
        if todo := [batch for batch in batches if not set(batch) <= set(answers[subject.name])]:
            stop.check()
            for batch in _answer(subject, todo, questions, speaking, tokenizer, run, stop):
                with store.open("a", encoding="utf-8") as file:  # A killed life may have left half a line.
                    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in batch]
                    file.write("\n" * (file.tell() > 0) + "".join(lines))
                answers[subject.name] |= {answer["index"]: answer for answer in batch}
                answered.add(len(batch), subject.name)
    by_group: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(question["group"] for question in questions.values()):
        its = [i for i, question in questions.items() if question["group"] == group]
        asked = [questions[i] for i in its]
        by_group[group] = {name: scoring.scores(asked, [given[i] for i in its]) for name, given in answers.items()}
        by_group[group]["copy"] = scoring.scores(asked, scoring.copies(asked))
    evaluation = by_group.pop(HELD_OUT) | by_group
    shown = [(questions[i], {name: found[i] for name, found in answers.items()}) for i in sorted(speaking)[:SAMPLES]]
    atomic.write_json(folder / "samples.json", [_sample(*one) for one in shown])
    atomic.write_json(run.evaluation_file, evaluation)
    return evaluation


class _Progress:
    """Reports kept answers as progress events: the first batch of an attempt at once, later ones now and then."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._run = run
        self._attempt = attempt
        self._reported_at: float | None = None
        self._answers = 0

    def add(self, answers: int, model: str) -> None:
        """Count answers that were just written to the file of `model`."""
        self._answers += answers
        now = time.monotonic()
        if self._reported_at is not None and now - self._reported_at < PROGRESS_EVENT_S:
            return
        self._reported_at = now
        events.progressed(self._run.path, "evaluate", self._attempt, f"{self._answers} answers, the last of {model}")


def read_answers(store: Path) -> dict[int, Any]:
    """Answers by question index; the last of an index counts, and a line that a crash cut short does not."""
    found: dict[int, Any] = {}
    for line in store.read_text(encoding="utf-8", errors="replace").split("\n") if store.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            answer = json.loads(line)
            found[answer["index"]] = answer
    return found


def _subjects(run: RunDir) -> Iterator[Subject]:
    spec, path = run.spec(), str(run.provenance()["model_path"])
    yield Subject("base", path)
    if spec.evaluate.few_shot:
        yield Subject("few_shot", path, shots=spec.evaluate.few_shot)
    made = run.export / ("merged" if spec.export.merged else "adapter")
    if not made.is_dir():
        raise InputError(f"{made}: is not there. Was the export stage completed?")
    prompt = run.export / "prompt" if spec.method.kind == "two-stage" else None
    if spec.export.merged:
        yield Subject("tuned", str(made), prompt=prompt, is_base=False)
    elif spec.method.kind == "prompt":
        yield Subject("tuned", path, prompt=made)
    else:
        yield Subject("tuned", path, adapter=made, prompt=prompt)


def _examples(rows: Path, count: int, tokenizer: tokenizing.Tokenizer, room: int) -> list[int]:
    """Ids of the first `count` training documents, one after another, or of as many as have `room`."""
    meta, arrays = packing.read(rows)
    found: list[int] = []
    taken = 0
    for row in range(meta["rows"]):
        ends = [*(arrays["positions"][row] == 0).nonzero()[0].tolist(), meta["seq_len"]]
        for start, end in pairwise(ends):
            if not arrays["response"][row, start:end].any():  # padding
                continue
            document = arrays["tokens"][row, start:end].tolist()[len(tokenizer.bos) if found else 0 :]
            if taken == count or len(found) + len(document) > room:
                print(f"few_shot: {taken} of {count} examples stand before each question", flush=True)
                return found
            found, taken = found + document, taken + 1
    return found


def _questions(file: Path, pairs: int) -> dict[int, Any]:
    """The first `pairs` held-out questions and every unseen one, by line number from 0."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}. Was the prepare stage completed?") from None
    questions = {number: json.loads(line) for number, line in enumerate(lines) if line}
    for number in [number for number, question in questions.items() if question["group"] == HELD_OUT][pairs:]:
        del questions[number]
    return questions


def _batches(questions: dict[int, Any], tokenizer: tokenizing.Tokenizer, size: int) -> list[list[int]]:
    """Indices in batches of like lengths, longest first: what does not fit the memory shows at once.
    They are always the same, so that an answer does not depend on interruptions."""
    lengths = [len(ids) for ids in tokenizer.prompts([question["prompt"] for question in questions.values()])]
    order = [index for _, index in sorted(zip(lengths, questions, strict=True), key=lambda pair: (-pair[0], pair[1]))]
    return [order[start : start + size] for start in range(0, len(order), size)]


def _answer(
    subject: Subject, batches: list[list[int]], questions: dict[int, Any], speaking: set[int],
    tokenizer: tokenizing.Tokenizer, run: RunDir, stop: StopFlag,
) -> Iterator[list[dict[str, Any]]]:
    """Answers of one model, a batch at a time; Interrupted when asked to stop."""
    import torch

    from ftlib.evaluate import answering
    from ftlib.train import kernels

    spec, numerics = run.spec(), run.numerics()
    of_stage = numerics.stages["evaluate"]
    kernels.choose(numerics.kernels, on_gpu=of_stage.device == "cuda", deterministic=of_stage.deterministic)
    model = answering.load(
        subject.path, device=of_stage.device, dtype=spec.export.dtype,
        revision=spec.model.revision, adapter=subject.adapter,
        expanded_key_heads=numerics.kernels.expanded_key_heads,
        added=(tokenizer, spec.train.seed) if subject.is_base else None)
    if spec.zero.stage and subject.name == "tuned":
        require_validation_loss(run, model, stop)
    new, prefix = spec.evaluate.max_new_tokens, []
    if subject.prompt:
        from ftlib.train.methods import put_prompt

        prefix = put_prompt(model, subject.prompt)
    elif subject.shots:
        longest = max(len(ids) for ids in tokenizer.prompts([question["prompt"] for question in questions.values()]))
        reads = getattr(model.config, "max_position_embeddings", None) or 2048
        room = reads - longest - max(new, spec.data.seq_len - longest)
        prefix = _examples(Path(run.prepared()["dataset"]) / "train", subject.shots, tokenizer, room)
    # A token of a tiny model is too little work to share: threads would wait for each other most of the time.
    torch.set_num_threads(numerics.threads if model.num_parameters() > TINY else 1)
    answerer = answering.Answerer(model, tokenizer, max_new_tokens=new, stop=stop, prefix=prefix)
    began, total, done = time.monotonic(), sum(map(len, batches)), 0
    for batch in batches:
        stop.check()
        asked = [index for index in batch if index in speaking]
        said = answerer.answers([questions[i]["prompt"] for i in asked]) if asked else []
        texts = dict(zip(asked, said, strict=True))
        nll = answerer.nll([questions[i]["prompt"] for i in batch], [questions[i]["response"] for i in batch])
        yield [
            {"index": index, "answer": texts.get(index), "nll": sum_of_nll, "tokens": tokens}
            for index, (sum_of_nll, tokens) in zip(batch, nll, strict=True)]
        done += len(batch)
        left = (time.monotonic() - began) / done * (total - done)
        print(f"{subject.name}: answered {done} of {total} questions, {left:.0f} s left", flush=True)
    del model, answerer
    gc.collect()


def _sample(question: Any, answers: dict[str, Any]) -> dict[str, Any]:
    """A question and its answers for a person to read; `exact` says whether the tuned model is right."""
    call = question["expected_call"]
    exact = scoring.is_exact(call, answers["tuned"]["answer"]) if call else None
    texts = {name: answer["answer"] for name, answer in answers.items()}
    prompt = question["prompt"] if isinstance(question["prompt"], str) else "".join(question["prompt"])
    return {"prompt": prompt, "response": question["response"], **texts, "exact": exact}
