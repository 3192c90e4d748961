"""Synthesis of function-calling instruction pairs: seeded, distinct, with held-out values.
A row shows another call of the same function as the example, which has none of the answer's free values (strings and
numbers from pools, each in one split): copying it is never exactly right. Closed choices cannot be held out."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from ftlib.data.functions import Argument, Function, natural, unseen
from ftlib.data.values import Split, Value, pool
from ftlib.errors import InputError

INSTRUCTION = "Generate a JSON response for a function call based on the user's question and the function call example."
# Each catalogue's functions, in a fixed order.
CATALOGUES: dict[str, Callable[[], tuple[Function, ...]]] = {"natural": natural, "unseen": unseen}


def generate(functions: str, split: Split, pairs: int, seed: int) -> list[dict[str, Any]]:
    """`pairs` rows with distinct questions, spread evenly over the functions, in random order, the same on every
    machine. {"instruction", "input": {"user_question", "function_call_example"}, "output": {"function_call"}}.
    InputError for more pairs than exist."""
    catalogue = CATALOGUES[functions]()
    rooms = [_room(function, split) for function in catalogue]
    if not 0 < pairs <= sum(rooms):
        raise InputError(f"pairs: {pairs} were asked for; {functions}/{split} has between 1 and {sum(rooms)}.")
    rng = random.Random(f"{functions} {split} {seed}")
    rows = []
    for function, room, share in zip(catalogue, rooms, _shares(rooms, pairs, rng), strict=True):
        rows += [_row(function, split, number, rng) for number in rng.sample(range(room), share)]
    rng.shuffle(rows)
    return rows


def _shares(rooms: list[int], pairs: int, rng: random.Random) -> list[int]:
    """Splits `pairs` over functions as evenly as their rooms allow."""
    shares = [0] * len(rooms)
    order = sorted(range(len(rooms)), key=lambda index: (rooms[index], rng.random()))
    for done, index in enumerate(order):
        shares[index] = min(rooms[index], pairs // (len(order) - done))
        pairs -= shares[index]
    return shares


def _values(argument: Argument, split: Split) -> tuple[Value, ...]:
    return tuple(argument.choices) if argument.choices else pool(argument.kind, split)


def _radices(function: Function, split: Split) -> Iterator[tuple[tuple[Value, ...], int]]:
    """Each argument's values, and how many earlier arguments draw from the same ones.
    A string or number of one pool stands once in a call (no flight from Lyon to Lyon); bools are free of each other."""
    earlier: list[tuple[Value, ...]] = []
    for argument in function.arguments:
        values = _values(argument, split)
        yield values, 0 if isinstance(values[0], bool) else earlier.count(values)
        earlier.append(values)


def _room(function: Function, split: Split) -> int:
    room = len(function.phrasings)
    for values, taken in _radices(function, split):
        room *= len(values) - taken
    return room


def _row(function: Function, split: Split, number: int, rng: random.Random) -> dict[str, Any]:
    """The row of one number below the function's room: its digits choose the phrasing and each argument's value."""
    number, phrasing = divmod(number, len(function.phrasings))
    call: list[Value] = []
    for values, taken in _radices(function, split):
        number, digit = divmod(number, len(values) - taken)
        call.append([value for value in values if value not in call][digit] if taken else values[digit])
    words = {
        argument.name: argument.choices[value] if argument.choices else str(value)
        for argument, value in zip(function.arguments, call, strict=True)
    }
    example = _call(function, _example(function, split, call, rng))
    asked = {"user_question": function.phrasings[phrasing].format(**words), "function_call_example": example}
    return {"instruction": INSTRUCTION, "input": asked, "output": {"function_call": _call(function, call)}}


def _example(function: Function, split: Split, answer: list[Value], rng: random.Random) -> list[Value]:
    """Another call of the function: no free value of the answer, no value twice."""
    example: list[Value] = []
    for argument in function.arguments:
        values = _values(argument, split)
        value = rng.choice(values)
        while not isinstance(value, bool) and (value in example or (argument.kind and value in answer)):
            value = rng.choice(values)
        example.append(value)
    return example


def _call(function: Function, values: list[Value]) -> dict[str, Any]:
    names = [argument.name for argument in function.arguments]
    return {"name": function.name, "arguments": dict(zip(names, values, strict=True))}
