"""A run folder is there whole or not at all, has one writer, and is found by its name alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib import rundir, state
from ftlib.errors import InputError
from ftlib.rundir import RunDir
from ftlib.runs import outcome
from ftlib.runs.events import Started, Submitted
from ftlib.runs.outcome import Outcome


@pytest.fixture
def run(odd_dir: Path) -> RunDir:
    code = odd_dir / "src"
    code.mkdir()
    (code / "a.py").write_text("x = 1\n")
    return rundir.create(odd_dir / "runs", "tiny-1", {"spec.json": {}, "plan.json": {}}, {"src": code})


def test_create_is_whole_and_happens_once(run: RunDir, odd_dir: Path) -> None:
    assert (run.code / "src" / "a.py").exists() and run.checkpoints.is_dir()
    again = rundir.create(odd_dir / "runs", "tiny-1", {"spec.json": {"other": 1}}, {})
    assert again.path == run.path and run.spec_file.read_text() == "{}\n"
    assert [path.name for path in (odd_dir / "runs").iterdir()] == ["tiny-1"]


def test_a_creation_that_fails_leaves_nothing(odd_dir: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        rundir.create(odd_dir / "runs", "tiny-1", {}, {"src": odd_dir / "missing"})
    assert list((odd_dir / "runs").iterdir()) == []


@pytest.mark.parametrize("name", ["../tiny-1", "/etc", ".", "..", "a/b", "", "tiny-1\n", ".tmp-x"])
def test_a_name_that_leaves_the_folder_is_refused(run: RunDir, name: str) -> None:
    with pytest.raises(InputError, match="no name of a run"):
        rundir.find(run.path.parent, name)


def test_an_unknown_run_is_answered_with_the_nearest(run: RunDir) -> None:
    with pytest.raises(InputError, match="Did you mean tiny-1"):
        rundir.find(run.path.parent, "tiny-2")


def test_events_of_all_writers_by_time_and_without_a_cut_line(run: RunDir) -> None:
    run.record(Submitted(stage="train", job_id="1"), writer="a")
    run.record(Started(stage="train", attempt=1, job_id="1"), writer="b")
    with (run.events / "b.jsonl").open("a") as file:
        file.write('{"time": "2026", "event": "comp')
    assert [type(event) for event in run.ledger().events] == [Submitted, Started]


def queued(run: RunDir, *stages: str) -> None:
    for number, stage in enumerate(stages, 1):
        run.record(Submitted(stage=stage, job_id=str(number)))


def states(run: RunDir, view: dict[str, tuple[str, str]] | None, *, alive: bool = False) -> dict[str, str]:
    return {name: s.state for name, s in state.stages(run.ledger(), view, alive=alive).items()}


ALL = ("prepare", "train", "export", "evaluate")


def test_outcomes_come_before_what_the_scheduler_says(run: RunDir) -> None:
    queued(run, *ALL)
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, "made"))
    view = {"1": ("FAILED", ""), "2": ("RUNNING", ""), "3": ("PENDING", "Dependency"), "4": ("PENDING", "Dependency")}
    assert list(states(run, view).values()) == ["completed", "running", "queued", "queued"]
    assert state.overall(state.stages(run.ledger(), view)) == "running"


@pytest.mark.parametrize(
    ("slurm", "ours"),
    [
        ("NODE_FAIL", "failed"),
        ("TIMEOUT", "failed"),
        ("OUT_OF_MEMORY", "failed"),
        ("COMPLETED", "failed"),  # without an outcome of 0 it did not complete
        ("CANCELLED", "cancelled"),
        ("PREEMPTED", "queued"),
        ("REQUEUED", "queued"),
        ("COMPLETING", "running"),
        ("", "failed"),
    ],
)
def test_every_end_that_slurm_knows(run: RunDir, slurm: str, ours: str) -> None:
    queued(run, "prepare")
    assert states(run, {"1": (slurm, "")} if slurm else {})["prepare"] == ours


def test_what_stands_behind_a_failure_is_cancelled(run: RunDir) -> None:
    queued(run, *ALL)
    outcome.write(run.outcomes, Outcome("prepare", 1, 64, "bad line 3"))
    found = state.stages(run.ledger(), {"1": ("FAILED", "")})
    assert [s.state for s in found.values()] == ["failed", "cancelled", "cancelled", "cancelled"]
    assert found["prepare"].words == "bad line 3" and state.overall(found) == "failed"


def test_a_local_run_goes_by_its_process(run: RunDir) -> None:
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, "made"))
    queued(run, "prepare", "train")
    (run.lives / "train-1").touch()
    assert list(states(run, None, alive=True).values()) == ["completed", "running", "queued", "queued"]
    assert list(states(run, None).values()) == ["completed", "cancelled", "cancelled", "cancelled"]
    outcome.write(run.outcomes, Outcome("train", 1, 1, "crashed"))
    assert states(run, None)["train"] == "failed"
