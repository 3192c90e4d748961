"""Sweeps: the report of the points, and a point's status."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from ftlib.rundir import STAGES, RunDir
from ftlib.runs import outcome
from tests.array_shims import Login
from tests.sweeps import fail, place, seeds, swept
from tests.wishes import jobs


def scored(login: Login, name: str, scores: list[float | None]) -> list[RunDir]:
    swept(login, name)
    members = place(login).members()
    for run, score in zip(members, scores, strict=True):
        if score is not None:
            tuned = {"perplexity": score, "exact": 1 - score / 10, "function": None, "valid_json": 1.0}
            run.evaluation_file.write_text(json.dumps({"tuned": tuned, "base": tuned}))
            for stage in STAGES:
                outcome.write(run.outcomes, outcome.Outcome(stage, 1, 0, "done"))
    return members


def test_the_report_sorts_by_the_metric_and_names_the_best(login: Login, file: Callable[..., str]) -> None:
    name = file("grid: {optim.lr: [1.0e-4, 1.0e-3], method.rank: [8, 16]}")
    members = scored(login, name, [1.5, 1.2, None, 1.9])
    shutil.rmtree(members[3].path)
    done = login.jobs("report", "--sweep", name, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["run"], row["perplexity"], row["state"]) for row in rows] == [
        (members[1].name, 1.2, "completed"),
        (members[0].name, 1.5, "completed"),
        (members[2].name, None, "queued"),
        (members[3].name, None, "gone"),
    ]
    assert rows[0]["optim.lr"] == 1e-4 and rows[0]["method.rank"] == 16 and "hours" in rows[0]
    words = login.jobs("report", "--sweep", name).stdout
    assert "method.rank=16" in words.split("The best again: ")[1]
    text = (place(login).path / "report.csv").read_text().splitlines()
    assert text[0].startswith("run,state,optim.lr,method.rank,perplexity") and text[1].startswith(members[1].name)


def test_why_a_point_failed_is_shown_with_its_brackets(login: Login, file: Callable[..., str]) -> None:
    name = file(seeds(2))
    swept(login, name)
    run = fail(login, login.queue.of("train")[-1], "0")
    outcome.write(run.outcomes, outcome.Outcome("train", 1, 1, "[rank0] boom"))
    assert "[rank0] boom" in login.jobs("report", "--sweep", name).stdout


def test_the_plot_is_png_and_svg(login: Login, file: Callable[..., str]) -> None:
    name = file(
        "list: [{optim.lr: 1.0e-4, method.kind: lora}, {optim.lr: 2.0e-3, method.kind: qlora}, {optim.lr: 1.0e-3}]"
    )
    scored(login, name, [1.5, 1.2, 1.3])
    assert login.jobs("report", "--sweep", name).returncode == 0
    png, svg = (place(login).path / f"report.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    assert "optim.lr" in svg.read_text() or svg.read_text().count("<path") > 20


def test_status_of_a_point_is_like_any_run_s(login: Login, file: Callable[..., str]) -> None:
    swept(login, file(seeds(3)))
    run = place(login).members()[2]
    done = jobs("status", "--json", "--run", run.name, checkout=login.checkout, **login.env)
    assert done.returncode == 0 and run.ledger().jobs["train"] in done.stdout, done.stderr
