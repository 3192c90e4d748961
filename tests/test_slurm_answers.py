"""What Slurm does not say: no accounting, a silent command, users who are not listed. A row is never wrong for that."""

from __future__ import annotations

import json
import pwd

import pytest

from ftlib.rundir import STAGES
from ftlib.runs import outcome
from ftlib.runs.events import Submitted
from ftlib.runs.outcome import Outcome
from ftlib.slurm import queue
from jobs import cli
from tests.seen import ARRAYS, Site, only, told, waiting

DISABLED = "echo 'Slurm accounting storage is disabled' >&2; exit 1\n"
DATABASE_IS_DOWN = "echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1\n"


def test_while_squeue_is_silent_its_last_answer_is_shown(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.make()
    site.say(waiting(prepare=("RUNNING", "None")))
    assert only(capsys)["state"] == "running"
    (site.place / "squeue.sh").write_text("echo 'Socket timed out on send/recv operation' >&2; exit 1\n")
    found = told(capsys)
    assert "Socket timed out" in found["trouble"]
    (row,) = found["runs"]
    assert row["state"] == "running" and row["stages"]["train"]["state"] == "queued"


def test_without_accounting_squeue_and_the_folder_suffice(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """accounting_storage/none: sacct fails always, and a job that squeue no longer lists has ended."""
    working, lost, done = site.make(3)
    (site.place / "sacct.sh").write_text(DISABLED)
    site.say(waiting(0, prepare=("RUNNING", "None")))
    (lost.lives / "prepare-1").write_text("1_0 n1 1700000000\n")
    outcome.write(lost.outcomes, Outcome("prepare", 1, 1, "a bug"))
    for stage in STAGES:
        outcome.write(done.outcomes, Outcome(stage, 1, 0, "done"))
    found = told(capsys)
    rows = {row["run"]: row for row in found["runs"]}
    assert found["trouble"] == ""
    assert [rows[run.name]["state"] for run in (working, lost, done)] == ["running", "failed", "completed"]
    assert rows[lost.name]["words"] == "prepare: a bug"
    (lost.outcomes / "prepare-1").unlink()
    assert {row["run"]: row["words"] for row in told(capsys)["runs"]}[lost.name] == (
        "prepare: Slurm does not know its job any more"
    )


def test_without_accounting_a_run_can_be_cancelled(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = site.make()
    (site.place / "sacct.sh").write_text(DISABLED)
    train = f"{ARRAYS[0]['train']}_0"
    site.say({train: ("RUNNING", "None")})  # the others' jobs are forgotten
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, "packed"))
    cancelled: list[str] = []
    monkeypatch.setattr("ftlib.slurm.client.cancel", lambda ids: cancelled.extend(ids))
    assert cli.main(["cancel", "--run", run.name]) == 0, capsys.readouterr().err
    assert cancelled == [train]


def test_what_squeue_says_counts_while_accounting_fails(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    at_work, gone = site.make(2)
    (site.place / "sacct.sh").write_text(DATABASE_IS_DOWN)
    at_work.record(Submitted(stage="recovery", job_id="990"))
    site.say(waiting(0, prepare=("RUNNING", "None")) | {"990": ("PENDING", "Dependency")})
    found = told(capsys)
    rows = {row["run"]: row for row in found["runs"]}
    assert "Problem talking to the database" in found["trouble"]
    assert rows[at_work.name]["state"] == "running"
    # It may have ended in any way: nothing is done about it.
    assert cli.main(["resume", "--run", gone.name]) == 69
    assert "cannot be learned" in capsys.readouterr().err
    assert cli.main(["resume", "--run", at_work.name]) == 0


@pytest.mark.parametrize(
    ("sacct", "accounting", "state_of_the_gone"),
    [("cat /dev/null\n", "answered", ""), (DISABLED, "disabled", ""), (DATABASE_IS_DOWN, "failed", "UNKNOWN")],
)
def test_an_answer_tells_what_accounting_did(
    site: Site, sacct: str, accounting: str, state_of_the_gone: str
) -> None:
    (site.place / "sacct.sh").write_text(sacct)
    site.say({"7": ("RUNNING", "None")})
    kept = site.place / "kept.json"
    for least_s in (0, 60):  # asked, and read back
        answer = queue.ask(["7", "8"], kept=kept, least_s=least_s)
        assert answer.accounting == accounting
        assert (answer.jobs["7"].state, answer.jobs["8"].state) == ("RUNNING", state_of_the_gone)
        assert answer.unknown(["7", "8"]) == (["8"] if accounting == "failed" else [])


def test_a_colleagues_run_is_asked_for_where_users_are_not_listed(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSSD and LDAP without enumeration: a name can be looked up, but getpwall lists only the local ones."""
    (run,) = site.make()
    run.provenance_file.write_text(json.dumps(run.provenance() | {"user": "nobody"}))
    site.say(waiting())
    monkeypatch.setattr(pwd, "getpwall", lambda: [])
    assert only(capsys)["state"] == "queued"
    assert "--user=nobody" in site.calls()[0]


def test_an_owner_whom_this_machine_does_not_know_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    mine, theirs = site.make(2)
    theirs.provenance_file.write_text(json.dumps(theirs.provenance() | {"user": "no-such-user"}))
    site.say({job: told for job, told in waiting(0).items()})
    rows = {row["run"]: row for row in told(capsys)["runs"]}
    assert rows[mine.name]["state"] == "queued" and rows[mine.name]["notes"] == []
    assert "--me" in site.calls()[0]  # squeue refuses a list with a name that it does not know
    assert rows[theirs.name]["state"] == "queued"  # by its folder
    assert any("no user no-such-user on this machine" in note for note in rows[theirs.name]["notes"])
