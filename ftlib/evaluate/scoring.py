"""Scores of answers against what was expected. A question is a line of test.jsonl; an answer is {"answer": text or
None, "nll": sum over the response's tokens in nats, "tokens": how many}, EOS included."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.data.formats import function_call_of, same_call

Question = Mapping[str, Any]
Answer = Mapping[str, Any]


def scores(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Any]:
    """valid_json, function and exact: shares of the questions that expect a call, null where none does.
    perplexity: exp of the mean nll a token over all questions, null where it is unknown; n counts the questions."""
    both = zip(questions, answers, strict=True)
    asked = [(q["expected_call"], a["answer"] or "") for q, a in both if q["expected_call"]]
    tokens = sum(answer["tokens"] for answer in answers)
    mean = sum(answer["nll"] for answer in answers) / tokens if tokens else math.inf
    return {
        "valid_json": _share([is_json_object(text) for _, text in asked]),
        "function": _share([(function_call_of(text) or {}).get("name") == call["name"] for call, text in asked]),
        "exact": _share([is_exact(call, text) for call, text in asked]),
        "perplexity": round(math.exp(mean), 4) if mean < 700 else None,
        "n": len(questions),
    }


def copies(questions: Sequence[Question]) -> list[Answer]:
    """The baseline's answers: the example that the prompt shows."""
    calls = [question["example_call"] for question in questions]
    texts = [json.dumps({"function_call": call}) if call else None for call in calls]
    return [{"answer": text, "nll": 0.0, "tokens": 0} for text in texts]


def is_json_object(text: str) -> bool:
    """Whether a text is one JSON object and nothing else but white space."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def is_exact(call: Mapping[str, Any], text: str) -> bool:
    """Whether a text makes exactly this call: name, arguments, and their types."""
    return same_call(function_call_of(text), call)


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None
