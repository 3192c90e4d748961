"""Synthesis: distinct pairs, values held out, no answer in the example, the same everywhere."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from typing import Any

import pytest

from ftlib.data.synthesis import CATALOGUES, INSTRUCTION, _room, generate
from ftlib.data.values import SPLITS, Value, split_of
from ftlib.errors import InputError
from tests.wishes import CHECKOUT

sys.path.append(str(CHECKOUT / "models" / "tiny-base"))
import composed  # noqa: F401 - adds its catalogue

SEEDS = {
    "get_current_weather": {"location": str, "unit": str},
    "currency_conversion": {"amount": (int, float), "from": str, "to": str},
}


def closed(name: str, functions: str) -> set[str]:
    function = next(function for function in CATALOGUES[functions]() if function.name == name)
    return {argument.name for argument in function.arguments if argument.choices is not None}


def free(call: dict[str, Any], functions: str) -> set[Value]:
    skip = closed(call["name"], functions)
    return {value for name, value in call["arguments"].items() if name not in skip}


def calls(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return row["output"]["function_call"], row["input"]["function_call_example"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, list[dict[str, Any]]]]:
    sizes = {"train": 10_000, "validation": 1_000, "test": 1_000}
    return {f: {s: generate(f, s, sizes[s], 7) for s in SPLITS} for f in CATALOGUES}


def test_shape_is_the_one_of_the_published_example(rows):
    row = rows["natural"]["train"][0]
    assert list(row) == ["instruction", "input", "output"]
    assert row["instruction"] == INSTRUCTION
    assert list(row["input"]) == ["user_question", "function_call_example"]
    for call in calls(row):
        assert list(call) == ["name", "arguments"]
    for name, types in SEEDS.items():
        found = [calls(r)[0]["arguments"] for r in rows["natural"]["train"] if calls(r)[0]["name"] == name]
        assert found and all(list(a) == list(types) for a in found)
        assert all(isinstance(a[k], t) for a in found for k, t in types.items())


@pytest.mark.parametrize("functions", CATALOGUES)
def test_questions_are_distinct_and_all_functions_asked_for(rows, functions):
    names = {function.name for function in CATALOGUES[functions]()}
    for split in SPLITS:
        found = rows[functions][split]
        assert len({json.dumps(row) for row in found}) == len(found)
        assert len({row["input"]["user_question"] for row in found}) > 0.999 * len(found)
        asked = {calls(row)[0]["name"] for row in found}
        assert asked <= names and len(asked) == min(len(names), len(found))


@pytest.mark.parametrize("functions", CATALOGUES)
def test_the_example_calls_the_same_function_and_holds_no_free_value_of_the_answer(rows, functions):
    for split in SPLITS:
        for row in rows[functions][split]:
            answer, example = calls(row)
            assert example["name"] == answer["name"] and list(example["arguments"]) == list(answer["arguments"])
            assert free(answer, functions) and not free(answer, functions) & free(example, functions)


def test_a_free_value_is_in_one_split_only_across_all_functions(rows):
    seen = {
        split: {value for f in CATALOGUES for row in rows[f][split] for call in calls(row) for value in free(call, f)}
        for split in SPLITS
    }
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert split_of(5) == split_of(5.0)


@pytest.mark.parametrize("functions", CATALOGUES)
def test_every_value_can_be_read_off_the_question(rows, functions):
    for row in rows[functions]["test"]:
        answer, question = calls(row)[0], row["input"]["user_question"]
        for value in answer["arguments"].values():
            if not isinstance(value, bool):
                said = value if isinstance(value, str) else json.dumps(value)
                assert said in question, (said, question)


def test_both_truths_of_a_bool_are_said_in_different_words():
    for functions in CATALOGUES:
        for function in CATALOGUES[functions]():
            for argument in function.arguments:
                if argument.choices:
                    assert len(set(argument.choices.values())) == len(argument.choices) >= 2


def test_catalogues_are_large_typed_and_share_no_function():
    names = {f: [function.name for function in CATALOGUES[f]()] for f in CATALOGUES}
    assert len(names["composed"]) >= 80 and len(names["natural"]) >= 12 and len(names["unseen"]) == 3
    everything = [name for f in CATALOGUES for name in names[f]]
    assert len(set(everything)) == len(everything)
    arguments = [a for function in CATALOGUES["natural"]() for a in function.arguments]
    assert any(a.choices and True in a.choices for a in arguments)
    for f in CATALOGUES:
        for function in CATALOGUES[f]():
            assert 1 <= len(function.arguments) <= 3 and len(set(function.phrasings)) >= 4
            assert all(f"{{{a.name}}}" in phrasing for a in function.arguments for phrasing in function.phrasings)
            assert any(a.choices is None for a in function.arguments)


def test_the_same_seed_gives_the_same_rows_in_another_process_and_another_seed_others():
    code = (
        "import composed, hashlib, json; from ftlib.data.synthesis import generate;"
        "print(hashlib.sha256(json.dumps(generate('composed', 'train', 500, 3)).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    random.seed(0)
    here = json.dumps(generate("composed", "train", 500, 3))
    assert found == {hashlib.sha256(here.encode()).hexdigest()}
    assert json.dumps(generate("composed", "train", 500, 4)) != here


def test_every_pair_that_exists_can_be_had_and_one_more_is_refused():
    room = sum(_room(function, "test") for function in CATALOGUES["unseen"]())
    most = generate("unseen", "test", room, 0)
    assert len({row["input"]["user_question"] for row in most}) == len(most) == room
    with pytest.raises(InputError, match=f"{room + 1} were asked for"):
        generate("unseen", "test", room + 1, 0)


@pytest.mark.parametrize("pairs", [0, -1])
def test_no_pairs_are_refused(pairs):
    with pytest.raises(InputError):
        generate("natural", "train", pairs, 0)


def test_ten_thousand_pairs_take_about_a_second():
    began = time.process_time()
    generate("natural", "train", 10_000, 0)
    assert time.process_time() - began < 3
