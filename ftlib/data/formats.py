"""Prompt formats: what the model reads (prompt) and what it must write (response), and the calls within.
Rows are Alpaca's {"instruction", "input" (optional), "output"}, {"prompt", "response"}, or {"messages": [{"role",
"content"}, …]}. An input, output or content is text, or a JSON object, which is written as compact JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib.errors import InputError, nearest, unknown

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n")
ROLES = ("system", "user", "assistant", "tool")
CHATML_END = "<|im_end|>"


@dataclass(frozen=True)
class Example:
    """One training example: `response` follows `prompt` with nothing in between; `before`: a conversation's earlier
    prompt, response, prompt, … Every response is a target of the loss and ends with EOS."""

    prompt: str
    response: str
    before: tuple[str, ...] = ()


def render(row: Mapping[str, Any], template: str) -> Example:
    """A row (one without a `problem`) in a template of `TEMPLATES`. A prompt/response row is taken as it is.

    "alpaca": the two prompts of Stanford Alpaca, with and without input.
    "brief": for tiny models; function-calling rows lose their constant instruction and show the example first.
    "chatml": <|im_start|>role … <|im_end|>; a function-calling row's example is in the system message.
    "guanaco": ### Human: … ### Assistant: …, as in openassistant-guanaco.
    """
    if template not in TEMPLATES:
        raise InputError(unknown("template", template, TEMPLATES))
    if "prompt" in row:
        return Example(row["prompt"], _text(row["response"]))
    if template in _CHATS:
        *before, prompt, response = _CHATS[template].texts(row["messages"] if "messages" in row else _messages(row))
        return Example(prompt, response, tuple(before))
    return Example(_PROMPTS[template](row), _text(row["output"]))


def problem(row: object, template: str = "") -> str | None:
    """What is wrong with a row, in words, or None. It names the field, what was found and what is allowed.
    With a `template`, a conversation that the template cannot hold is wrong, too."""
    if not isinstance(row, dict):
        return f"a row must be a JSON object, found {_kind(row)}"
    if "messages" in row:
        if template in _PROMPTS:
            return f"is a conversation; data.template={template} holds none. Allowed: {', '.join(_CHATS)}"
        return _messages_problem(row["messages"])
    ask, answer = ("prompt", "response") if "prompt" in row or "response" in row else ("instruction", "output")
    for field in (ask, answer):
        if field not in row:
            return f"field {field!r} is missing; found {', '.join(map(repr, row)) or 'no fields'}"
    if not isinstance(row[ask], str):
        return f"field {ask!r} must be text, found {_kind(row[ask])}"
    if not row[ask].strip():
        return f"field {ask!r} is empty"
    for field in ("input", answer):
        if not isinstance(row.get(field, ""), str | dict) and not (field == "input" and row[field] is None):
            return f"field {field!r} must be text or a JSON object, found {_kind(row[field])}"
    if not row[answer] or not _text(row[answer]).strip():
        return f"field {answer!r} is empty: there is nothing to learn"
    return None


def _messages_problem(messages: object) -> str | None:
    if not isinstance(messages, list):
        return f"field 'messages' must be a list, found {_kind(messages)}"
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            found = ", ".join(map(repr, message)) if isinstance(message, dict) else _kind(message)
            return f"{where} must be an object with 'role' and 'content', found {found}"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"{where}: 'role' is {role!r}. Allowed: {', '.join(ROLES)}.{nearest(str(role), ROLES)}"
        if not isinstance(content, str | dict):
            return f"{where}: 'content' must be text or a JSON object, found {_kind(content)}"
        if not content or not _text(content).strip():
            return f"{where}: 'content' is empty"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "field 'messages' has no message of the assistant: there is nothing to learn"
    return "field 'messages' begins with the assistant: there is nothing to answer" if roles[0] == "assistant" else None


def function_call_of(text: str) -> dict[str, Any] | None:
    """The call {"name", "arguments"} in a model's text, which must be exactly {"function_call": {…}}; else None.
    NaN and a name given twice are no valid JSON here."""
    try:
        found = json.loads(text, parse_constant=refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"function_call": {"name": str(), "arguments": dict()} as call} if len(found) == 1 and len(call) == 2:
            return dict(call)
    return None


def expected_call(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The call that a row's output asks for, or None for rows of another kind."""
    output = row.get("output", row.get("response"))
    for turn in row.get("messages", ()):
        output = turn["content"] if turn["role"] == "assistant" else output
    return function_call_of(_text(output)) if isinstance(output, str | dict) else None


def example_call(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The call that a function-calling row shows as its example, or None for rows of another kind."""
    match row.get("input"):
        case {"function_call_example": dict() as example}:
            return function_call_of(_text({"function_call": example}))
    return None


def same_call(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two calls are equal in name, arguments and JSON types (1, 1.0 and true differ); key order is free."""
    return None not in (one, other) and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _alpaca(row: Mapping[str, Any]) -> str:
    given = _text(row.get("input") or "")
    return (_ALPACA_INPUT if given else _ALPACA).format(instruction=row["instruction"], input=given)


def _brief(row: Mapping[str, Any]) -> str:
    given = row.get("input") or ""
    if _shows_a_call(given):
        return f"example: {_text(given['function_call_example'])}\nuser: {given['user_question']}\ncall: "
    return f"user: {row['instruction']}\n" + (f"input: {_text(given)}\n" if given else "") + "answer: "


def _shows_a_call(given: Any) -> bool:
    return isinstance(given, dict) and set(given) == {"user_question", "function_call_example"}


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An Alpaca row as a conversation."""
    given, turns = row.get("input") or "", []
    ask = row["instruction"] + (f"\n\n{_text(given)}" if given else "")
    if _shows_a_call(given):
        system = f"{row['instruction']}\nFunction call example: {_text(given['function_call_example'])}"
        turns, ask = [{"role": "system", "content": system}], str(given["user_question"])
    return [*turns, {"role": "user", "content": ask}, {"role": "assistant", "content": row["output"]}]


@dataclass(frozen=True)
class _Chat:
    """How a template writes a message: opening, gap, content, closing; `between` it and the next."""

    openings: Mapping[str, str]
    gap: str = ""
    closing: str = ""
    between: str = ""

    def texts(self, messages: Sequence[Mapping[str, Any]]) -> list[str]:
        """Prompt, response, prompt, response, …; what follows the last response is left out."""
        texts: list[str] = []
        prompt = ""
        for message in messages:
            opening, content = self.openings[message["role"]], self.gap + _text(message["content"]) + self.closing
            if message["role"] == "assistant":
                texts += [prompt + opening, content]
                prompt = self.between
            else:
                prompt += opening + content + self.between
        return texts


_PROMPTS: dict[str, Callable[[Mapping[str, Any]], str]] = {"alpaca": _alpaca, "brief": _brief}
_CHATS = {
    "chatml": _Chat({role: f"<|im_start|>{role}\n" for role in ROLES}, closing=CHATML_END, between="\n"),
    # The space stands before the answer, not at the prompt's end: so vocabularies know the first word.
    "guanaco": _Chat(dict(zip(ROLES, ("### System:", "### Human:", "### Assistant:", "### Tool:"), strict=True)), " "),
}
TEMPLATES = (*_PROMPTS, *_CHATS)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _kind(value: object) -> str:
    names = {dict: "a JSON object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def refuse(constant: str) -> None:
    """json's parse_constant: NaN and Infinity are no JSON."""
    raise ValueError(f"{constant} is no JSON value")
