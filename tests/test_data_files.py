"""Data files: what is taken, what is refused and how, and which rows are held out."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib.data import sources
from ftlib.data.sources import check_file, part_of
from ftlib.errors import InputError
from ftlib.spec import DataSpec
from tests.wishes import CHECKOUT

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def rows(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"Add {n} and {n}.", "output": str(2 * n)} for n in range(count)]


def write(path: Path, values: list[Any]) -> Path:
    text = json.dumps(values) if ".json." in f"{path.name}." else "\n".join(map(json.dumps, values))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.json.gz", "D.JSONL"])
def test_every_kind_of_file_is_read_whole(odd_dir: Path, name: str) -> None:
    path = write(odd_dir / name, rows(300))
    summary = check_file(path)
    assert summary.rows == 300
    assert summary.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert summary.bytes == path.stat().st_size


def test_prompt_response_rows_blank_lines_and_a_byte_order_mark_are_taken(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{n}? ", "response": {"answer": n}}) for n in range(200)]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert check_file(path).rows == 200


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'instruction': 1}", "is no JSON: Expecting property name"),
        ('{"instruction": "a", "output": NaN}', "NaN is no JSON value"),
        ('{"instruction": "a"}', "field 'output' is missing"),
        ('{"output": "a"}', "field 'instruction' is missing"),
        ('{"instruction": "a", "output": " "}', "field 'output' is empty"),
        ('{"prompt": "a", "response": ""}', "field 'response' is empty"),
        ('{"instruction": "a", "output": "\\ud83d"}', "half of a two-part character"),
        ('["a", "b"]', "must be a JSON object, found a list"),
        ('"a"', "must be a JSON object, found text"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", line, json.dumps(GOOD)]))
    with pytest.raises(InputError) as error:
        check_file(path)
    (message,) = error.value.messages
    assert message.startswith(f"{path}, line 3: ") and words in message


def test_twenty_bad_lines_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "no JSON"] * 57))
    with pytest.raises(InputError) as error:
        check_file(path)
    assert [m.split(": ")[0] for m in error.value.messages[:-1]] == [f"{path}, line {n}" for n in range(2, 42, 2)]
    assert error.value.messages[-1] == f"{path}: and 37 more"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.jsonl", b"\n \n", "is empty"),
        ("d.json", b"", "is empty"),
        ("d.json", b"[]", "is empty"),
        ("d.json", b'{"a": 1}', "one list of objects"),
        ("d.json", b'[{"instruction": "a", "output": "b"}\n{}]', "is no JSON: Expecting ',' delimiter at line 2"),
        ("d.json", b'[{"instruction": "a", "output": "b"}, "x"]', "item 2: a row must be a JSON object"),
        ("d.jsonl", b'{"instruction": "\xff\xfe"}', "line 1: is not text (UTF-8)"),
        ("d.jsonl", b"\x00\x9f\x92\x96" * 99, "is not text (UTF-8)"),
        ("d.jsonl.gz", b"not compressed", "cannot be read"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], "cannot be read"),
        ("d.csv", b"a,b", "allowed: .jsonl, .json, .jsonl.gz, .json.gz"),
    ],
)
def test_a_file_that_is_no_data_is_refused_in_words(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="^" + str(path)) as error:
        check_file(path)
    assert words in str(error.value)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(InputError, match=r"there is no such file\. Did you mean train\.jsonl\?"):
        check_file(tmp_path / "trian.jsonl")
    with pytest.raises(InputError, match=r"cannot be read: .*directory"):
        (tmp_path / "folder.jsonl").mkdir()
        check_file(tmp_path / "folder.jsonl")


def test_too_few_rows_to_hold_some_out_is_an_error_that_says_what_helps(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(12))
    with pytest.raises(
        InputError, match=r"12 rows are too few: data.held_out=0.05 leaves none for .*data.held_out=0.4"
    ):
        check_file(path)
    assert check_file(path, DataSpec(held_out=0.4)).rows == 12


def test_the_split_follows_content_and_seed_alone() -> None:
    data, many = DataSpec(held_out=0.1), rows(4000)
    parts = [part_of(row, data) for row in many]
    assert 150 < parts.count("test") < 250 and 150 < parts.count("validation") < 250
    # Fields that nobody reads, an absent input and the order of keys make no other row.
    again = [
        {"output": row["output"], "id": n, "input": "", "instruction": row["instruction"]} for n, row in enumerate(many)
    ]
    assert [part_of(row, data) for row in again] == parts
    assert [part_of(row, DataSpec(held_out=0.1, seed=1)) for row in many] != parts
    # What was held out stays so when more is.
    more = [part_of(row, DataSpec(held_out=0.2)) for row in many]
    assert all(new != "train" for old, new in zip(parts, more, strict=True) if old != "train")


def test_appended_rows_move_no_other_row_and_the_limit_takes_from_training_alone(tmp_path: Path) -> None:
    data = DataSpec(held_out=0.2, limit=50)
    short, long = write(tmp_path / "a.jsonl", rows(200)), write(tmp_path / "b.jsonl", rows(300))
    first, second = sources.read(data, short, test_pairs=8), sources.read(data, long, test_pairs=8)
    assert all(row in second.validation for row in first.validation)
    assert all(pair in second.test for pair in first.test)
    assert len(first.train) == len(second.train) == 50
    assert first.train == sources.read(data, short, test_pairs=8).train
    assert first.train != sources.read(data.model_copy(update={"seed": 3}), short, test_pairs=8).train


def test_the_generator_gives_as_many_as_asked_and_functions_that_are_in_no_training() -> None:
    made = sources.read(DataSpec(pairs=400, limit=300), None, test_pairs=90)
    assert len(made.train) == 300 and len(made.validation) == 20
    groups = {group: [row for at, row in made.test if at == group] for group, _ in made.test}
    assert {group: len(found) for group, found in groups.items()} == {"held-out": 90, "unseen": sources.UNSEEN_PAIRS}
    names = {group: {row["output"]["function_call"]["name"] for row in found} for group, found in groups.items()}
    trained = {row["output"]["function_call"]["name"] for row in made.train}
    assert names["held-out"] <= trained and len(names["unseen"]) == 3 and not names["unseen"] & trained


def test_checking_a_file_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "datasets", "peft", "tokenizers", "numpy", "bitsandbytes"}
    code = f"import sys, ftlib.data.sources; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
