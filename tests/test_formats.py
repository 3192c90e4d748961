"""Formats: the prompts a model sees, the calls read back from text, and what is said of a bad row."""

from __future__ import annotations

import json

import pytest

from ftlib.data.formats import TEMPLATES, example_call, expected_call, function_call_of, problem, render, same_call
from ftlib.data.synthesis import INSTRUCTION, generate
from ftlib.errors import InputError

WEATHER = {"name": "get_current_weather", "arguments": {"location": "Boston, MA", "unit": "fahrenheit"}}
OTHER = {"name": "get_current_weather", "arguments": {"location": "Zürich", "unit": "celsius"}}
ROW = {
    "instruction": INSTRUCTION,
    "input": {"user_question": "How warm is Boston, MA in fahrenheit?", "function_call_example": OTHER},
    "output": {"function_call": WEATHER},
}


def test_alpaca_with_an_input_is_the_published_prompt():
    example = render({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca")
    assert example.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert example.response == "3"


@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_an_input_is_the_shorter_prompt(row):
    assert render({"instruction": "Greet {me}.", "output": "Hi", **row}, "alpaca").prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet {me}.\n\n### Response:\n"
    )


def test_objects_are_compact_json_with_letters_kept():
    example = render(ROW, "alpaca")
    assert json.dumps(ROW["input"], ensure_ascii=False, separators=(",", ":")) in example.prompt
    assert "Zürich" in example.prompt
    assert example.response == (
        '{"function_call":{"name":"get_current_weather","arguments":{"location":"Boston, MA","unit":"fahrenheit"}}}'
    )


def test_brief_leaves_the_constant_instruction_out():
    example = render(ROW, "brief")
    assert INSTRUCTION not in example.prompt and "How warm is Boston, MA" in example.prompt
    assert '"location":"Zürich"' in example.prompt
    assert example.response == render(ROW, "alpaca").response


def test_brief_keeps_instruction_and_input_of_other_rows():
    assert render({"instruction": "Add.", "input": "1 2", "output": "3"}, "brief").prompt.splitlines()[:2] == [
        "user: Add.",
        "input: 1 2",
    ]
    assert "input" not in render({"instruction": "Greet.", "output": "Hi"}, "brief").prompt
    assert '{"a":1}' in render({"instruction": "Add.", "input": {"a": 1}, "output": "3"}, "brief").prompt


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_response_rows_are_taken_as_they_are(template):
    example = render({"prompt": " Hi ", "response": "there "}, template)
    assert (example.prompt, example.response) == (" Hi ", "there ")


def test_chatml_puts_the_example_of_a_call_into_the_system_message():
    example = render(ROW, "chatml")
    shown = json.dumps(OTHER, ensure_ascii=False, separators=(",", ":"))
    assert example.prompt == (
        f"<|im_start|>system\n{INSTRUCTION}\nFunction call example: {shown}<|im_end|>\n"
        "<|im_start|>user\nHow warm is Boston, MA in fahrenheit?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.response == render(ROW, "alpaca").response + "<|im_end|>" and not example.before


TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": {"sum": 4}},
        {"role": "user", "content": "Thanks"},
    ]
}


def test_a_conversation_is_prompts_and_responses_in_turn_in_chatml():
    example = render(TALK, "chatml")
    assert example.before == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>",
    )
    assert example.prompt == "\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert example.response == '{"sum":4}<|im_end|>'


def test_guanaco_is_the_text_of_openassistant_guanaco():
    example = render({"messages": TALK["messages"][1:]}, "guanaco")
    text = "".join([*example.before, example.prompt, example.response])
    assert text == '### Human: Hi### Assistant: Hello### Human: 2 + 2?### Assistant: {"sum":4}'
    assert example.prompt.endswith("### Assistant:") and example.before[1] == " Hello"


def test_alpaca_rows_are_conversations_of_one_turn_in_chat_templates():
    example = render({"instruction": "Add.", "input": "1 2", "output": "3"}, "chatml")
    assert example.prompt == "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    assert render({"instruction": "Greet.", "output": "Hi"}, "guanaco").prompt == "### Human: Greet.### Assistant:"


@pytest.mark.parametrize("template", ["alpaca", "brief"])
def test_a_conversation_in_a_template_for_instructions_is_told_what_fits(template):
    found = problem(TALK, template)
    assert found is not None and "Allowed: chatml, guanaco" in found and template in found
    assert problem(TALK) is None and problem(TALK, "chatml") is None and problem(ROW, template) is None


def test_the_call_of_a_conversation_is_its_last_answer():
    last = {"role": "assistant", "content": {"function_call": WEATHER}}
    assert expected_call({"messages": [*TALK["messages"], last]}) == WEATHER
    assert expected_call(TALK) is None and example_call(TALK) is None


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean alpaca"):
        render(ROW, "alpacca")


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "3", '"x"', "{", '{"name":"f","arguments":{}}', '{"function_call":{}}',
        '{"function_call":null}',
        '{"function_call":{"name":"f"}}', '{"function_call":{"name":3,"arguments":{}}}',
        '{"function_call":{"name":"f","arguments":[]}}', '{"function_call":{"name":"f","arguments":{},"more":1}}',
        '{"function_call":{"name":"f","arguments":{}},"more":1}', '{"function_call":{"name":"f","arguments":{}}} and',
        '{"function_call":{"name":"f","arguments":{"x":NaN}}}', "[" * 100_000, "1" * 10_000,
        '{"function_call":{"name":"f","arguments":{"x":1,"x":2}}}',
    ],
)  # fmt: skip
def test_text_that_is_no_call_is_none(text):
    assert function_call_of(text) is None


def test_a_call_is_read_with_any_white_space():
    assert function_call_of(' {"function_call": {"arguments": {"x": 1}, "name": "f"}}\n') == {
        "name": "f",
        "arguments": {"x": 1},
    }


def test_every_generated_row_is_good_and_its_own_response_scores_as_exact():
    for row in generate("natural", "test", 200, 0):
        assert problem(row) is None
        call = expected_call(row)
        assert same_call(function_call_of(render(row, "brief").response), call)
        example = example_call(row)
        assert example is not None and call is not None
        assert example["name"] == call["name"] and not same_call(example, call)


def test_calls_with_other_types_are_not_the_same():
    def call(value):
        return {"name": "f", "arguments": {"x": value}}

    assert same_call({"arguments": {"a": 1, "b": 2}, "name": "f"}, {"name": "f", "arguments": {"b": 2, "a": 1}})
    assert (
        not same_call(call(1), call(1.0)) and not same_call(call(1), call(True)) and not same_call(call(1), call("1"))
    )
    assert not same_call(None, None)


@pytest.mark.parametrize("row", [{"instruction": "a", "output": "b"}, {"prompt": "a", "response": "b"}])
def test_rows_of_other_kinds_have_no_call(row):
    assert problem(row) is None and expected_call(row) is None and example_call(row) is None


def test_a_call_written_as_text_is_a_call():
    row = {"instruction": INSTRUCTION, "input": ROW["input"], "output": json.dumps(ROW["output"])}
    assert expected_call(row) == WEATHER


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "a list"),
        ("x", "text"),
        (None, "null"),
        ({}, "'instruction' is missing"),
        ({"instruction": "a"}, "'output' is missing"),
        ({"output": "a"}, "'instruction' is missing"),
        ({"prompt": "a"}, "'response' is missing"),
        ({"response": "a"}, "'prompt' is missing"),
        ({"instruction": 3, "output": "b"}, "'instruction' must be text, found a number"),
        ({"instruction": " ", "output": "b"}, "'instruction' is empty"),
        ({"instruction": "a", "input": [1], "output": "b"}, "'input' must be text or a JSON object, found a list"),
        ({"instruction": "a", "output": None}, "'output' must be text or a JSON object, found null"),
        ({"instruction": "a", "output": True}, "'output' must be text or a JSON object, found true or false"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "output": " \n"}, "'output' is empty"),
        ({"instruction": "a", "output": {}}, "'output' is empty"),
        ({"prompt": "a", "response": ""}, "'response' is empty"),
        ({"messages": "a"}, "'messages' must be a list, found text"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": ["a"]}, "message 1 must be an object with 'role' and 'content', found text"),
        ({"messages": [{"role": "user"}]}, "message 1 must be an object with 'role' and 'content', found 'role'"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "Did you mean assistant?"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "'role' is ['user']. Allowed: system, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' must be text or a JSON object, found a number"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: 'content' is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
    ],
)
def test_a_bad_row_is_told_by_field_found_and_allowed(row, said):
    found = problem(row)
    assert found is not None and said in found
