"""How often a training saves: from the measured cost of a save and the kills it has seen; and whose rows count."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ftlib.metrics import MetricsWriter, read_metrics
from ftlib.rundir import RunDir
from ftlib.runs import outcome
from ftlib.train.interval import Cadence, History, history, interval_s, mean_between_kills_h


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_youngs_interval() -> None:
    assert interval_s(2.0, 24.0) == pytest.approx(math.sqrt(2 * 2 * 86400))
    assert mean_between_kills_h(24, 0, 0) == 24
    assert mean_between_kills_h(24, 6, 2) == 10


def test_the_interval_is_the_best_one() -> None:
    """Lost work and saves together cost least there: each save δ, each kill half an interval."""
    save, between = 3.0, 2.0

    def lost(interval: float) -> float:
        return save / interval + interval / 2 / (between * 3600)

    best = interval_s(save, between)
    assert lost(best) < min(lost(0.8 * best), lost(1.25 * best))


@pytest.mark.parametrize(("step_s", "first"), [(0.1, 20), (10.0, 6), (100.0, 1)])
def test_the_first_save_comes_early_and_then_its_cost_decides(step_s: float, first: int) -> None:
    clock = Clock()
    cadence = Cadence(None, 24, History(), clock)
    saved = []
    for step in range(1, 6000):
        clock.now += step_s
        if cadence.due(step):
            saved.append(step)
            clock.now += 1.0
            cadence.saved(1.0)
    assert saved[0] == first
    between = math.ceil(interval_s(1.0, 24) / step_s)
    assert saved[1] - saved[0] == pytest.approx(between, rel=0.01, abs=1), "the hours of this life count a little"


def test_a_life_that_knows_the_cost_does_not_save_early() -> None:
    clock = Clock()
    cadence = Cadence(None, 24, History(hours=1, save_s=[4, 1, 1]), clock)
    assert not any(cadence.due(step) for step in range(1, 1000))
    clock.now += interval_s(2.0, 25) + 5
    assert cadence.due(1000)


def test_more_kills_mean_more_saves_and_kills_before_the_first_save_halve_the_interval() -> None:
    calm = Cadence(None, 24, History(hours=10, save_s=[1.0]), Clock()).seconds
    killed = Cadence(None, 24, History(hours=10, kills=16, save_s=[1.0]), Clock()).seconds
    barren = Cadence(None, 24, History(hours=10, kills=16, barren=2, save_s=[1.0]), Clock()).seconds
    assert calm and killed and barren
    assert killed == pytest.approx(calm / math.sqrt(17)) and barren == pytest.approx(killed / 4)


def test_steps_said_in_the_recipe_are_kept() -> None:
    cadence = Cadence(8, 24, History(), Clock())
    assert [step for step in range(1, 30) if cadence.due(step)] == [8, 16, 24] and cadence.words() is None


def test_the_interval_and_its_reason_are_told_once() -> None:
    cadence = Cadence(None, 24, History(hours=1.5, kills=2, save_s=[2.0]), Clock())
    said = cadence.words()
    assert said and "a save takes 2.00 s" in said and "(2 in 1.5 h so far)" in said and "every 8.5 h" in said
    assert cadence.words() is None
    cadence.saved(20.0)
    assert "a save takes 11.00 s" in str(cadence.words())


def test_history_counts_lives_that_nobody_warned(tmp_path: Path) -> None:
    """Life 1 was told to stop, 2 was killed after a save, 3 and 4 before one; 5 is the present one."""
    run = RunDir(tmp_path)
    run.events.mkdir()
    run.outcomes.mkdir()

    def event(life: int, minute: int, name: str, **fields: object) -> None:
        with (run.events / f"train-{life}.jsonl").open("a") as file:
            time = f"2026-01-01T10:{minute:02}:00.000000+00:00"
            row = {"time": time, "event": name, "stage": "train", "life": life, **fields}
            file.write(json.dumps(row) + "\n")

    event(1, 0, "started")
    event(1, 9, "checkpoint", seconds=1.0, step=5)
    event(1, 10, "interrupted", code=75)
    outcome.write(run.outcomes, outcome.Outcome("train", 1, 75, "interrupted (preemption), saved at step 5"))
    event(2, 20, "started")
    for minute, seconds in ((22, 1.0), (24, 2.0), (26, 3.0)):
        event(2, minute, "checkpoint", seconds=seconds, step=minute)
    row = {"step": 27, "loss": 1.0, "life": 2, "time": "2026-01-01T10:28:00.000+00:00"}
    run.metrics_file.write_text(json.dumps(row) + "\n")
    event(3, 40, "started")
    event(4, 50, "started")
    event(5, 55, "started")
    past = history(run, 5)
    assert past == History(hours=18 / 60, kills=3, barren=2, save_s=[1.0, 2.0, 3.0])
    assert history(run, 1) == History()


def test_read_metrics_lets_the_last_life_win(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for life, steps in ((1, range(1, 8)), (2, range(4, 6)), (3, range(5, 7))):
        writer = MetricsWriter(path, life)
        for step in steps:
            writer.append(step=step, loss=float(step))
        if life == 1:
            writer.append(step=3, eval_loss=0.5)
            writer.append(step=6, eval_loss=0.7)
        writer.close()
    rows = read_metrics(path)
    assert [(row["step"], row["life"]) for row in rows if "loss" in row] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (6, 3)
    ]  # fmt: skip
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [(3, 0.5)], "6 is not done yet"
    assert rows[3]["step"] == 3 and "eval_loss" in rows[3], "a validation row stands behind its step's"
