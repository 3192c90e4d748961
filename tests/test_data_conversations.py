"""Conversations: the best path of a message tree, and turns whose answers alone are targets."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftlib.data import sources
from ftlib.data.formats import render
from ftlib.errors import InputError
from ftlib.spec import DataSpec
from tests.tiny_models import write_model
from tests.wishes import CHECKOUT

GUANACO = DataSpec(template="guanaco", held_out=0.3)


def node(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": text, "role": "prompter", "replies": list(replies), **more}


def answer(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return node(text, *replies, **{"role": "assistant", **more})


def rows_of(path: Path, values: list[Any], data: DataSpec = GUANACO) -> list[list[str]]:
    """The texts of every example in a file of these rows."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return [[turn["content"] for turn in row["messages"]] for row in sources.good_rows(sources._rows(path), "f", data)]


def flat(root: dict[str, Any], parent: str | None = None, name: str = "0") -> list[dict[str, Any]]:
    """A tree as flat messages."""
    own = {key: value for key, value in root.items() if key != "replies"} | {"message_id": name, "parent_id": parent}
    return [own] + [row for n, reply in enumerate(root["replies"]) for row in flat(reply, name, f"{name}.{n}")]


RANKED = node(
    "q",
    answer("second", rank=1),
    answer("deleted", rank=0, deleted=True),
    answer("best", node("unanswered"), node("more", answer("last", node("trailing"), rank=0)), rank=0),
    answer("unranked"),
)


@pytest.mark.parametrize("form", ["trees", "messages", "messages backwards"])
def test_the_best_ranked_reply_is_taken_at_every_turn(tmp_path: Path, form: str) -> None:
    rows: list[Any] = [{"message_tree_id": "t", "prompt": RANKED}] if form == "trees" else flat(RANKED)
    if form == "messages backwards":
        rows.reverse()
    assert rows_of(tmp_path / "d.jsonl", rows) == [["q", "best", "more", "last"]]


def test_without_ranks_the_first_reply_stands_and_unanswered_trees_are_left_out(tmp_path: Path) -> None:
    trees = [node("a", answer("1"), answer("2")), node("alone"), node("b", answer(" ", rank=0)), node("c", answer("3"))]
    assert rows_of(tmp_path / "d.jsonl", [{"prompt": tree} for tree in trees]) == [["a", "1"], ["c", "3"]]


def test_bad_trees_and_messages_are_named_by_line_and_reason(tmp_path: Path) -> None:
    good = {"prompt": node("a", answer("1"))}
    with pytest.raises(InputError) as error:
        rows_of(tmp_path / "d.jsonl", [good, {"prompt": node("a", answer("1", role="bot"))}, {"instruction": "a"}])
    assert "f, line 2: a message's role is 'bot'. Allowed: prompter, assistant" in error.value.messages[0]
    assert "f, line 3: is no message tree" in error.value.messages[1]
    one = {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"}
    with pytest.raises(InputError) as error:
        rows_of(tmp_path / "d.jsonl", [one, one, {**one, "message_id": "2", "parent_id": "9"}, {"text": "a"}])
    text = str(error.value)
    assert "line 2: message_id '1' stands in line 1, too" in text and "parent_id '9' is of no message here" in text
    assert "line 4: is no message of a tree" in text


def test_the_format_can_be_said_and_is_then_held_to(tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "b", "instruction": "c"}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row))
    for kind, said in (("alpaca", "'response'"), ("messages", "data.format=messages: field 'messages' is missing")):
        data = DataSpec(template="chatml", format=kind)  # type: ignore[arg-type]
        if kind == "alpaca":
            assert list(sources.good_rows(sources._rows(path), "f", data)) == [row]
            continue
        with pytest.raises(InputError, match=said):
            list(sources.good_rows(sources._rows(path), "f", data))
    with pytest.raises(InputError, match="is no message tree"):
        list(sources.good_rows(sources._rows(path), "f", DataSpec(template="guanaco", format="oasst-trees")))


def test_conversations_in_the_alpaca_template_are_refused_when_submitted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: is a conversation; data\.template=alpaca holds none"):
        rows_of(tmp_path / "d.jsonl", [{"prompt": RANKED}], DataSpec())


def test_a_share_of_the_training_examples_is_chosen_by_the_seed_and_held_out_rows_stay() -> None:
    path = CHECKOUT / "samples" / "alpaca.jsonl"
    whole = sources.read(DataSpec(held_out=0.2), path, test_pairs=1)
    part = sources.read(DataSpec(held_out=0.2, share=0.1), path, test_pairs=1)
    assert len(part.train) == -(-len(whole.train) // 10) and part.validation == whole.validation
    assert [row for row in whole.train if row in part.train] == part.train
    assert part.train != sources.read(DataSpec(held_out=0.2, share=0.1, seed=1), path, test_pairs=1).train
    assert len(sources.read(DataSpec(held_out=0.2, share=0.1, limit=7), path, test_pairs=1).train) == 7


def test_the_ids_of_a_conversation_are_its_turns_and_answers_alone_are_targets(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="tokenising needs transformers: the train extra")
    from ftlib.data import tokenizing

    for name, begins in (("tiny-llama3", 1), ("tiny-falcon", 0)):
        write_model(tmp_path / name, name)
        tokenizer = tokenizing.load(str(tmp_path / name))
        talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye?"), ("assistant", "Bye")]
        example = render({"messages": [{"role": role, "content": text} for role, text in talk]}, "chatml")
        documents = tokenizing.Documents(1000)
        assert documents.add(tokenizer, [example]) == [True] and len(tokenizer.bos) == begins
        runs: list[list[int]] = []
        for before, token, target in zip([0, *documents.targets], documents.tokens, documents.targets, strict=False):
            if target:
                runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        assert runs == tokenizer.responses(["Hello<|im_end|>", "Bye<|im_end|>"])
        assert all(run[-1] == tokenizer.eos for run in runs)
        # What generation is asked with is, to the id, what training saw before the last answer.
        (asked,) = tokenizer.prompts([[*example.before, example.prompt]])
        assert documents.tokens.tolist() == asked + runs[-1]
        assert tokenizer.text(runs[-1]) == "Bye"
        assert tokenizer.prompts(["Hi"]) == [tokenizer.bos + tokenizer.encode(["Hi"])[0]]


def test_a_prepared_conversation_asks_for_its_last_answer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="tokenising needs transformers: the train extra")
    from ftlib.data.prepare import prepare
    from ftlib.stop import StopFlag
    from tests.tiny_llama import write_run

    model, trees = CHECKOUT / "models" / "tiny-falcon", CHECKOUT / "samples" / "oasst_trees.jsonl"
    wish = {"data__template": "guanaco", "data__held_out": 0.3, "data__path": str(trees)}
    prepared = prepare(write_run(tmp_path / "run", model, trees, **wish), StopFlag())
    lines = (Path(prepared["dataset"]) / "test.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    longer = [prompt for prompt in prompts if isinstance(prompt, list)]
    assert len(prompts) == prepared["test"] and 0 < len(longer) < len(prompts)
    assert all(len(prompt) == 3 and prompt[2] == "### Human: Thank you.### Assistant:" for prompt in longer)
    assert prepared["train"]["examples"] > 20 and prepared["train"]["dropped_too_long"] == 0


@pytest.mark.skipif(not os.environ.get("FTLIB_REAL_DATA"), reason="FTLIB_REAL_DATA names no folder of real data")
def test_real_trees_give_one_path_each(tmp_path: Path) -> None:
    path = Path(os.environ["FTLIB_REAL_DATA"]) / "oasst_en_100_tree.jsonl.gz"
    if not path.exists():
        pytest.skip(f"FTLIB_REAL_DATA has no {path.name}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trees = [json.loads(line) for line in file]
    found = list(sources.good_rows(sources._rows(path), "f", GUANACO))
    assert len(found) == len(trees) == 100
    for tree, row in zip(trees, found, strict=True):
        texts = [turn["content"] for turn in row["messages"]]
        ranked = {reply["text"]: reply.get("rank") for reply in tree["prompt"]["replies"]}
        assert texts[0] == tree["prompt"]["text"]
        assert ranked[texts[1]] == min((rank for rank in ranked.values() if rank is not None), default=None)
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * (len(texts) // 2)
