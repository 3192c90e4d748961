"""A damaged run folder is one row that names the file and what to do; it hides no other run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftlib import sweepdir
from ftlib.rundir import RunDir
from jobs import cli, feeder, sweep
from tests.seen import Site, shown, told, waiting


def garbage(path: Path) -> None:
    path.write_text("{ not JSON")


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00{")


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose(path: Path) -> None:
    path.unlink()


DAMAGES = [
    (name, damage)
    for name in ("spec.json", "plan.json", "provenance.json")
    for damage in (garbage, a_list, not_utf8, a_folder, empty, lose)
]
DAMAGES += [("outcomes/train-1", not_utf8), ("outcomes/train-1", a_folder), ("events/x.jsonl", a_folder)]


def whole_and_damaged(site: Site, name: str, damage: Callable[[Path], None]) -> tuple[RunDir, RunDir]:
    whole, damaged = site.make(2)
    site.say({**waiting(0), **waiting(1)})
    damage(damaged.path / name)
    return whole, damaged


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{name}-{damage.__name__}" for name, damage in DAMAGES])
def test_status_shows_a_damaged_run_in_one_row_beside_all_others(
    site: Site, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    whole, damaged = whole_and_damaged(site, name, damage)
    rows = {row["run"]: row for row in told(capsys)["runs"]}
    assert rows[whole.name]["state"] == "queued" and rows[whole.name]["notes"] == []
    row = rows[damaged.name]
    assert row["state"] == "unreadable" and row["stages"] == {}
    assert str(damaged.path / name) in row["words"] and "restore it from a backup" in row["words"]
    flat = "".join(shown(capsys, "status").split())
    assert "".join(row["words"].split()) in flat and f"{whole.name}queued" in flat


@pytest.mark.parametrize("name", ["provenance.json", "outcomes/train-1", "events/x.jsonl"])
@pytest.mark.parametrize("command", ["why", "logs", "cancel", "resume"])
def test_a_command_about_a_damaged_run_says_so(
    site: Site, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    _, damaged = whole_and_damaged(site, name, a_folder)
    assert cli.main([command, "--run", damaged.name]) == 64
    assert str(damaged.path / name) in capsys.readouterr().err


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], None]]:
    """Go on as a user who may read no other's files; root may read all."""
    if os.geteuid() != 0:
        yield lambda: None
        return
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


def test_a_run_that_may_not_be_read_is_shown_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_nobody: Callable[[], None]
) -> None:
    place = Path(tempfile.mkdtemp())  # pytest's own folders are its user's alone
    try:
        place.chmod(0o755)
        site = Site(place, monkeypatch)
        whole, closed, secret = site.make(3)
        site.say({**waiting(0), **waiting(1), **waiting(2)})
        (place / "calls").chmod(0o666)
        closed.path.chmod(0)
        secret.provenance_file.chmod(0)
        as_nobody()
        rows = {row["run"]: row for row in told(capsys)["runs"]}
        assert {name: row["state"] for name, row in rows.items()} == {
            whole.name: "queued", closed.name: "unreadable", secret.name: "unreadable"
        }  # fmt: skip
        assert f"{secret.provenance_file}: cannot be read (Permission denied)" in rows[secret.name]["words"]
        assert cli.main(["why", "--run", closed.name]) == 64
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(place)


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_damaged_point_is_counted_and_the_report_has_the_others(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = site.make(3, sweep="lr")
    site.say({job: said for index in range(3) for job, said in waiting(index).items()})
    garbage(runs[1].provenance_file)
    (row,) = told(capsys)["sweeps"]
    assert row["states"] == {"queued": 2, "unreadable": 1} and str(runs[1].provenance_file) in row["words"]
    rows = told(capsys, "--sweep", "lr")["runs"]
    assert [row["state"] for row in rows] == ["queued", "unreadable", "queued"]
    monkeypatch.setattr(sweep, "RUNS", site.runs)
    runs[2].plan_file.unlink()
    report = json.loads(shown(capsys, "report", "--sweep", "lr", "--json"))
    assert {row["run"]: row["state"] for row in report} == {
        runs[0].name: "queued", runs[1].name: "unknown", runs[2].name: "unreadable"
    }  # fmt: skip


def test_a_damaged_sweep_hides_no_other(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.make(1, sweep="lr")
    site.say(waiting())
    other = site.runs / "sweeps" / "broken"
    other.mkdir()
    garbage(other / "sweep.json")
    rows = {row["sweep"]: row for row in told(capsys)["sweeps"]}
    assert rows["broken"]["state"] == "unreadable" and str(other / "sweep.json") in rows["broken"]["words"]
    assert rows["lr"]["states"] == {"queued": 1}
    monkeypatch.setattr(sweep, "RUNS", site.runs)
    assert cli.main(["report", "--sweep", "broken"]) == 64
    assert cli.main(["report", "--sweep", "lr", "--json"]) == 0


def test_a_sweep_is_queued_without_its_damaged_points(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = site.make(3, sweep="lr")
    (runs[0].events / "x.jsonl").mkdir()
    garbage(runs[1].provenance_file)
    monkeypatch.setattr(feeder.Arrays, "queue", lambda self, needs: None)
    monkeypatch.setattr(feeder, "_queue_feeder", lambda *arguments: None)
    fed = feeder.feed(sweepdir.find(site.runs, "lr"), by="sweep")
    assert [run for words, names in fed.told.items() if str(site.runs) in words for run in names] == [
        runs[0].name, runs[1].name
    ]  # fmt: skip
