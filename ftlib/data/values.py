"""Pools of free argument values. A value's JSON text alone decides its one split, for every function and pool."""

import json
import random
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import yaml

Split = Literal["train", "validation", "test"]
Value = str | int | float | bool
SPLITS: tuple[Split, ...] = get_args(Split)


@cache
def words() -> dict[str, list[str]]:
    """The lists of words.yaml: of cities, first names, verbs and so on."""
    found = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def split_of(value: Value) -> Split:
    """The split of a free value: 80 % train, 10 % validation, 10 % test. Equal numbers have equal splits (5, 5.0)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    share = zlib.crc32(json.dumps(value).encode()) % 10
    return "train" if share < 8 else "validation" if share == 8 else "test"


@cache
def pool(kind: str, split: Split) -> tuple[Value, ...]:
    """The distinct values of one kind that belong to a split, in a fixed order."""
    return tuple(value for value in _pools()[kind] if split_of(value) == split)


@cache
def _pools() -> dict[str, tuple[Value, ...]]:
    rng, lists = random.Random("value pools"), words()
    months = [f"{year}-{month:02}" for year in (2025, 2026, 2027) for month in range(1, 13)]
    kinds: dict[str, Iterable[Value]] = {
        "city": [*lists["cities"], *_product(lists["areas"], lists["cities"])],
        "person": _product(lists["first"], lists["last"]),
        "title": _product(lists["title_a"], lists["title_b"]) + _product(lists["title_b"], lists["title_a"]),
        "errand": _product(lists["deed"], lists["thing"]),
        "date": [f"{month}-{day:02}" for month in months for day in range(1, 29)],
        "time": [f"{hour:02}:{minute:02}" for hour in range(24) for minute in range(60)],
        "ticker": [_letters(rng, 3, 4).upper() for _ in range(900)],
        "code": [f"{_letters(rng, 2, 3).upper()}{rng.randrange(1000, 100000)}" for _ in range(2000)],
        "word": [invented_word(rng, 2, 3) for _ in range(4000)],
        "phrase": [" ".join(invented_word(rng, 1, 3) for _ in range(rng.randint(2, 3))) for _ in range(6000)],
        "name": [" ".join(invented_word(rng, 1, 3).title() for _ in range(rng.randint(1, 2))) for _ in range(6000)],
        "handle": [f"{invented_word(rng, 1, 3)}{rng.choice('-_.')}{rng.randrange(10, 1000)}" for _ in range(3000)],
        "small": range(2, 120), "count": range(2, 400), "large": range(400, 20000, 7),
        "tenths": [k / 10 for k in range(21, 1500) if k % 10],
        "cents": [k / 100 for k in range(101, 30000, 7) if k % 10],
        "amount": [*range(10, 3000, 5), *(k / 2 for k in range(21, 2000, 2))],
    }
    return {kind: tuple(dict.fromkeys(values)) for kind, values in kinds.items()}


def _product(left: Iterable[str], right: list[str]) -> list[str]:
    return [f"{a} {b}" for a in left for b in right]


def _letters(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(least, most)))


def invented_word(rng: random.Random, least: int, most: int) -> str:
    """An invented word of some syllables: copying it cannot be learned by heart."""
    lists = words()
    syllables = []
    for _ in range(rng.randint(least, most)):
        coda = rng.choice(lists["codas"]) if rng.random() < 0.5 else ""
        syllables.append(rng.choice(lists["onsets"]) + rng.choice("aeiou") + coda)
    return "".join(syllables)
