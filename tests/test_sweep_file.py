"""Sweeps: what a file expands to, and how a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftlib import sweep
from ftlib.errors import InputError
from ftlib.sweep import SweepSpec
from tests.wishes import CHECKOUT


def spec(**fields: Any) -> SweepSpec:
    return SweepSpec.model_validate(fields)


def test_a_grid_is_every_combination_the_last_field_fastest() -> None:
    grid = spec(grid={"optim.lr": [1e-4, 1e-3], "method.rank": [8, 16]})
    assert grid.points() == (
        {"optim.lr": 1e-4, "method.rank": 8},
        {"optim.lr": 1e-4, "method.rank": 16},
        {"optim.lr": 1e-3, "method.rank": 8},
        {"optim.lr": 1e-3, "method.rank": 16},
    )
    assert grid.count() == 4


def test_random_points_repeat_with_the_seed_differ_from_each_other_and_stay_inside() -> None:
    fields = {"optim.lr": {"log": [1e-5, 1e-3]}, "method.rank": [8, 16], "train.seed": {"integers": [1, 3]},
              "method.dropout": {"uniform": [0.0, 0.2]}}  # fmt: skip
    drawn = [spec(random={"points": 200, "seed": seed, "fields": fields}).points() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(point.values()) for point in drawn[0]}) == 200
    rates = [point["optim.lr"] for point in drawn[0]]
    assert min(rates) >= 1e-5 and max(rates) <= 1e-3
    # Uniform in the logarithm: half of them below the geometric middle.
    assert 60 < sum(rate < 1e-4 for rate in rates) < 140
    assert {point["method.rank"] for point in drawn[0]} == {8, 16}
    assert {point["train.seed"] for point in drawn[0]} == {1, 2, 3}


def test_a_small_space_gives_what_it_has() -> None:
    few = spec(random={"points": 10, "fields": {"method.rank": [8, 16]}})
    assert len(few.points()) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid: {method.ranks: [1]}", ["'method.ranks' is no field", "Did you mean method.rank?"]),
        ("grid: {rank: [1], lr: [2]}", ["Did you mean method.rank?", "Did you mean optim.lr?"]),
        ("grid: {}", ["expands to no point"]),
        ("grid: {method.rank: []}", ["expands to no point", "method.rank has no values"]),
        ("list: []", ["expands to no point"]),
        ("description: nothing", ["exactly one of grid, list and random; found none"]),
        ("{grid: {method.rank: [1]}, list: [{method.rank: 2}]}", ["found grid and list"]),
        ("{grd: {method.rank: [1]}}", ["grd is no known field", "Did you mean grid?"]),
        ("random: {points: 0, fields: {optim.lr: {log: [1, 2], uniform: [1, 2]}}}", ["exactly one of choices"]),
        ("random: {points: 3, fields: {optim.lr: {log: [0, 1]}}}", ["no range of positive numbers"]),
        ("{grid: {method.rank: [1]}, metric: los, at_once: 0}", ["metric", "at_once"]),
        ("- a list", ["must hold fields"]),
        ("grid: [", ["is no valid YAML"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_whole(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError) as found:
        sweep.load(tmp_path, "mine")
    for word in words:
        assert word in str(found.value)


def test_the_sweeps_that_come_with_it_are_right() -> None:
    folder = CHECKOUT / "jobs" / "sweeps"
    assert [sweep.load(folder, path.stem).count() for path in sorted(folder.glob("*.yaml"))] == [24, 40, 5]
