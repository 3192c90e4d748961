"""Status: what a person sees of runs and sweeps, and what Slurm is asked for it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pty
import shutil
import subprocess
import time
from io import StringIO

import pytest
from rich.console import Console

from benchmarks.status import status
from ftlib import metrics, state
from ftlib.report.board import board
from ftlib.report.cost import stage_costs
from ftlib.report.status import Row, SweepRow
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import events, outcome
from ftlib.runs.attempts import Attempt
from ftlib.runs.events import Cancelled, Moved, Resumed, Settled, Started, Submitted
from ftlib.runs.ledger import Ledger
from ftlib.runs.outcome import Outcome
from ftlib.slurm.client import Job
from ftlib.slurm.queue import Answer, why_waits
from jobs import cli, look, runs
from tests.processes import started
from tests.seen import ARRAYS, RUNNING, Site, only, shown, told, waiting
from tests.wishes import CHECKOUT

# -- what Slurm is asked -----------------------------------------------------------------------------------------------


def test_thousands_of_tasks_are_one_question_and_a_sweep_is_one_line(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    made = site.make(1250, sweep="lr")
    queue = {job: told for index in range(1250) for job, told in waiting(index).items()}
    for stage in STAGES[1:]:
        del queue[f"{ARRAYS[1][stage]}_200"]  # purged: accounting is asked
    queue |= waiting(7, prepare=("RUNNING", "None"))
    (site.place / "sacct").write_text(f"{ARRAYS[1]['train']}_200|CANCELLED by 0\n")
    site.say(queue)
    found = told(capsys)
    assert found["runs"] == []
    (sweep,) = found["sweeps"]
    assert (sweep["runs"], sweep["states"]) == (1250, {"running": 1, "queued": 1248, "cancelled": 1})
    assert sweep["words"].startswith("1249 × jobs of higher priority come first")
    squeue, sacct = site.calls()
    assert "--array" in squeue and f"-j {','.join(ARRAYS[1][s] for s in STAGES[1:])} " in sacct
    assert len(told(capsys, "--sweep", "lr")["runs"]) == len(made)


@pytest.mark.parametrize(
    ("slurm", "ends", "expected"),
    [
        ("PENDING", [], ("queued", "queued")),
        ("RUNNING", [], ("running", "queued")),
        ("RUNNING", [Outcome("export", 1, 0, "exported")], ("completed", "running")),
        ("FAILED", [Outcome("export", 1, 1, "a bug")], ("failed", "cancelled")),
        ("FAILED", [Outcome("export", 1, 0, "exported")], ("completed", "failed")),
        ("CANCELLED", [Outcome("export", 1, 75, "interrupted")], ("cancelled", "cancelled")),
        ("UNKNOWN", [], ("running", "queued")),
    ],
)
def test_of_two_stages_in_one_job_the_second_waits_for_the_first(
    slurm: str, ends: list[Outcome], expected: tuple[str, str]
) -> None:
    done = {stage: (Outcome(stage, 1, 0, "done"),) for stage in ("prepare", "train")}
    begun = {stage: (Attempt(stage=stage, number=1),) for stage in STAGES}
    known = Ledger(
        events=tuple(Submitted(stage=stage, job_id="7") for stage in ("export", "evaluate")),
        attempts={stage: of_stage for stage, of_stage in begun.items() if stage != "evaluate"},
        outcomes={**done, "export": tuple(ends)},
    )
    found = state.stages(known, {"7": Job(slurm, "Resources")})
    if slurm == "RUNNING" and ends:
        found = state.stages(dataclasses.replace(known, attempts=begun), {"7": Job(slurm)})
    assert (found["export"].state, found["evaluate"].state) == expected
    if expected == ("running", "queued"):
        assert found["evaluate"].words == "in the same job, after export"


@pytest.mark.parametrize("slurm", ["TIMEOUT", "FAILED", "CANCELLED"])
def test_a_job_that_was_ending_when_its_owner_cancelled_it_is_cancelled(slurm: str) -> None:
    submitted = [Submitted(stage=stage, job_id="7") for stage in STAGES]
    known = Ledger(
        events=(*submitted, Cancelled(stage="prepare", job_id="7")),
        attempts={"prepare": (Attempt(stage="prepare", number=1),)},
        outcomes={"prepare": (Outcome("prepare", 1, 75, "interrupted (time limit)"),)},
    )
    found = state.stages(known, {"7": Job(slurm)})
    assert {stage.state for stage in found.values()} == {"cancelled"}


def test_an_answer_stands_for_the_least_poll_interval(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = site.make()
    value = run.provenance()
    value["profile"]["scheduler"]["poll_interval_s"] = 60
    run.provenance_file.write_text(json.dumps(value))
    site.say(waiting())
    assert only(capsys)["state"] == "queued" and len(site.calls()) == 1
    assert only(capsys)["state"] == "queued" and site.calls() == []
    # Another submit since, of which the answer cannot know.
    run.record(Submitted(stage="train", job_id="999", nonce="n"))
    only(capsys)
    assert [call.split()[0] for call in site.calls()] == ["squeue", "sacct"]
    # A clock that was set back: the answer would be of the future.
    now = time.time()
    monkeypatch.setattr("ftlib.slurm.queue.time.time", lambda: now - 3600)
    only(capsys)
    assert site.calls()


def test_without_an_answer_the_folders_tell_and_the_trouble_is_said(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = site.make()
    (site.place / "squeue.sh").write_text(
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, "packed"))
    for life in ("prepare-1", "train-1"):
        (run.lives / life).write_text("1_0 n1 1700000000\n")
    found = told(capsys)
    assert "Unable to contact" in found["trouble"] and found["runs"][0]["state"] == "running"
    text = shown(capsys, "status")
    assert "Unable to contact" in text and "run folders tell" in text
    # Acting on a guess would be worse than waiting.
    assert cli.main(["resume", "--run", run.name]) == 69


def test_an_end_that_accounting_told_is_not_asked_for_again(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.make()
    (site.place / "sacct").write_text("".join(f"{array}_0|FAILED\n" for array in ARRAYS[0].values()))
    assert only(capsys)["state"] == "failed" and len(site.calls()) == 2
    assert only(capsys)["state"] == "failed" and [call.split()[0] for call in site.calls()] == ["squeue"]


@pytest.mark.parametrize("told", ["PENDING", "RUNNING"])
def test_a_job_that_the_controller_lost_is_not_waited_for(
    site: Site, capsys: pytest.CaptureFixture[str], told: str
) -> None:
    """It was killed before it had the job on disk; accounting says for ever what it heard last."""
    site.make()
    (site.place / "sacct").write_text("".join(f"{array}_0|{told}\n" for array in ARRAYS[0].values()))
    found = only(capsys)
    assert (found["state"], found["stages"]["prepare"]["words"]) == ("failed", "Slurm does not know its job any more")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "jobs of higher priority come first"),
        ("(Resources)", "waits until enough of the nodes are free"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "nodes that it needs are down, or reserved"),
        ("QOSGrpGRES", "its QOS allows no more GPUs for the whole group now"),
        ("QOSMaxJobsPerUserLimit", "its QOS allows no more jobs a user"),
        ("AssocGrpCpuLimit", "its account allows no more CPUs for the whole group now"),
        ("AssocMaxWallDurationPerJobLimit", "its account allows no more wall time a job"),
        ("launch_failed_requeued_held", "could not be started on its node"),
        ("SomethingNew", "Slurm says SomethingNew"),
    ],
)
def test_why_a_job_waits_is_said_in_words(reason: str, words: str) -> None:
    assert words in why_waits(Job("PENDING", reason, start="N/A"), 0)


def test_when_it_is_thought_to_start_is_said_where_slurm_knows() -> None:
    at = 1_700_000_000
    said = why_waits(Job("PENDING", "Priority", start=str(at)), at - 7200)
    assert said.endswith(f"; thought to start at {time.strftime('%H:%M', time.localtime(at))}")
    assert "start at" not in why_waits(Job("PENDING", "Priority", start="1700000000"), 1_700_000_100)


# -- what is shown of a run --------------------------------------------------------------------------------------------


def trained(run: RunDir, steps: int, *, life: int = 1, ago_s: float = 0, every_s: float = 2.0) -> None:
    """A training at work, at its `steps`-th step `ago_s` ago."""
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, "packed"))
    (run.lives / f"train-{life}").write_text(f"{ARRAYS[0]['train']}_0 n1 1700000000 \n")
    now = datetime.datetime.now(datetime.timezone.utc)
    with run.metrics_file.open("a") as file:
        for step in range(1, steps + 1):
            at = now - datetime.timedelta(seconds=ago_s + (steps - step) * every_s)
            row = {"step": step, "loss": 2 / step, "tokens_per_s": 1000.0, "seconds": 1.0, "life": life}
            file.write(json.dumps({**row, "time": at.isoformat(timespec="milliseconds")}) + "\n")


def test_a_training_at_work_shows_its_step_loss_speed_and_what_is_left(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = site.make()
    trained(run, 100)
    site.say(waiting(**RUNNING))
    row = only(capsys)
    assert (row["stage"], row["step"], row["loss"], row["tokens_per_s"]) == ("train", 100, 0.02, 1000)
    assert row["steps"] == run.plan()["steps"]
    later = sum(60 * run.plan()["stages"][stage]["estimate_min"] for stage in ("export", "evaluate"))
    assert row["left_s"] == pytest.approx((row["steps"] - 100) * 2.0 + later)  # saves and validations included
    assert row["words"] == ""
    line = shown(capsys, "status").splitlines()[1]
    assert run.name in line and f"100/{row['steps']}" in line and "1,000" in line


def test_a_training_that_makes_no_step_is_pointed_out(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = site.make()
    trained(run, 100, ago_s=3000)
    site.say(waiting(**RUNNING))
    assert only(capsys)["words"] == f"no step for 50 min: make logs RUN={run.name}"


def test_a_resumed_life_shows_where_it_goes_on_not_what_was_lost(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = site.make()
    trained(run, 100)
    (run.lives / "train-2").write_text("1 n1 1700000000 \n")
    settled = Settled(stage="train", attempt=1, job_id="1", cause="preemption", by="epilogue")
    run.record(settled, writer="train-1-epilogue")
    run.record(Resumed(stage="train", attempt=2, step=60), writer="train-2")
    site.say(waiting(**RUNNING))
    row = only(capsys)
    assert (row["step"], row["loss"], row["lives"], row["causes"]) == (60, None, 2, {"preemption": 1})
    assert "lives that ended early: preemption" in shown(capsys, "status")


def test_gpu_hours_used_lost_and_idle(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = site.make()
    plan = run.plan()
    plan["stages"]["train"] |= {"device": "cuda", "nodes": 1, "gpus_per_node": 2}
    run.plan_file.write_text(json.dumps(plan))
    trained(run, 3)
    for name, minute, fields in (("started", 0, {}), ("checkpoint", 60, {"step": 1}), ("failed", 90, {"code": 1})):
        said = {
            "time": f"2026-01-01T{minute // 60:02}:{minute % 60:02}:00+00:00",
            "event": name,
            "stage": "train",
            "life": 1,
        }
        with (run.events / "train-1.jsonl").open("a") as file:
            file.write(json.dumps({**said, **fields}) + "\n")
    rows = [{"time": "t", "life": 1, "utilization": float(share), "memory_gib": 1.0} for share in (0, 4, 5, 80)]
    (run.path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"time": "t", "utiliz')
    site.say(waiting(prepare=("COMPLETED", ""), train=("FAILED", "")))
    row = only(capsys)
    assert (row["gpu_hours"], row["lost_gpu_hours"], row["state"]) == (3.0, 1.0, "failed")
    assert row["idle_gpu_hours"] == pytest.approx(2 * metrics.GPU_EVERY_S / 3600)
    assert "3.00" in shown(capsys, "status") and "1.00" in shown(capsys, "status")


def test_a_life_that_was_settled_later_cost_no_time_in_the_queue() -> None:
    own = [
        events.Started(stage="train", attempt=1, job_id="7", time=0.0),
        events.CheckpointSaved(stage="train", attempt=1, step=5, time=600.0),
    ]
    later = Settled(stage="train", attempt=1, job_id="7", cause="node failure", by="prologue", time=3000.0)
    (cost,) = stage_costs(Ledger(events=(*own, later)), {}, now=3600.0)
    assert (cost.seconds, cost.lost_seconds) == (600, 0)
    (cost,) = stage_costs(Ledger(events=(*own, dataclasses.replace(later, ended=840.0))), {}, now=3600.0)
    assert (cost.seconds, cost.lost_seconds) == (840, 240)


def rows_of_every_kind() -> tuple[list[Row], list[SweepRow]]:
    long = "its account allows no more GPUs for the whole group now; thought to start at Mon 14:05"
    full = Row(
        run="llama2-7b-0123abcd-2", state="running", stage="train", step=12_345, steps=100_000, loss=1.2345,
        tokens_per_s=123_456.7, left_s=86_400.0, lives=12, causes={"preemption": 9, "node failure": 2},
        gpu_hours=1234.5, lost_gpu_hours=3.25, idle_gpu_hours=1.0, notes=["it belongs to ada"],
    )  # fmt: skip
    waits = Row(run="tiny-1", state="queued", stage="prepare", left_s=30.0, words=long)
    sweep = SweepRow(sweep="lr-rank-tiny-01234567", state="running", runs=5000, words=f"4000 × {long}",
                     states={"running": 12, "queued": 4000, "failed": 3, "completed": 985}, lives=1200)  # fmt: skip
    return [full, waits], [sweep]


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_every_width_shows_name_state_and_words_whole(width: int) -> None:
    text = StringIO()
    rows, sweeps = rows_of_every_kind()
    Console(file=text, width=width).print(board(rows, sweeps, Answer({}), width=width))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in text.getvalue()
    flat = " ".join(text.getvalue().split())
    for word in (
        "llama2-7b-0123abcd-2",
        "running",
        "4,000 queued",
        "985 completed",
        "Mon 14:05",
        "node failure × 2",
        "ada",
    ):
        assert word in flat
    assert ("123,457" in flat) == (width >= 110) and ("1,234.50" in flat) == (width >= 110)


def test_a_terminal_is_redrawn_and_a_pipe_gets_what_has_changed(site: Site) -> None:
    """--watch ends by itself when nothing is queued or running any more."""
    (run,) = site.make()
    site.say(waiting(prepare=("RUNNING", "None")))
    command = status(site.runs, "--watch")
    master, slave = pty.openpty()
    with (
        started(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as piped,
        started(command, cwd=CHECKOUT, stdout=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"}) as drawn,
    ):
        os.close(slave)
        assert piped.stdout
        assert "run" in piped.stdout.readline()
        site.say({job: ("CANCELLED", "None") for job in waiting()})
        rest = piped.stdout.read()
        seen = b""
        while True:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the other side is closed
                break
        assert (piped.wait(20), drawn.wait(20)) == (0, 0)
    os.close(master)
    assert rest.count(run.name) == 2 and "\x1b" not in rest and b"\x1b[" in seen and b"cancelled" in seen


# -- wrong input, and runs that lie or belong elsewhere ----------------------------------------------------------------


def test_run_and_sweep_exclude_each_other(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "cancel"):
        assert cli.main([command, "--run", "a", "--sweep", "b"]) == 64
    assert "exclude each other" in capsys.readouterr().err


def test_a_copy_has_no_jobs_of_its_own(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = site.make()
    site.say(waiting())
    shutil.copytree(run.path, site.runs / "other")
    elsewhere = site.place / "elsewhere" / "runs"
    shutil.copytree(run.path, elsewhere / run.name)
    rows = {row["run"]: row for row in told(capsys)["runs"]}
    assert rows[run.name]["state"] == "queued" and rows[run.name]["notes"] == []
    assert rows["other"]["state"] == "cancelled"
    assert f"a copy of run {run.name} under another name" in rows["other"]["notes"][0]
    assert cli.main(["resume", "--run", "other"]) == 64
    assert "Give the folder its name back" in capsys.readouterr().err
    (copied,) = look.see([RunDir(elsewhere / run.name)])
    assert copied.place == "copy" and state.overall(copied.stages) == "cancelled"


def test_a_moved_run_says_where_its_jobs_look_for_it(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = site.make()
    site.say(waiting())
    moved = site.place / "moved" / "runs"
    shutil.copytree(site.runs, moved)
    shutil.rmtree(site.runs)
    for module in (look, runs):
        monkeypatch.setattr(module, "RUNS", moved)
    row = only(capsys)
    assert row["state"] == "queued" and f"moved here from {site.runs}" in row["notes"][0]
    assert cli.main(["resume", "--run", run.name]) == 64
    assert f"make cancel RUN={run.name}" in capsys.readouterr().err
    # Once it was resumed, here is where it is.
    RunDir(moved / run.name).record(Moved(to=str(moved / run.name)))
    row = only(capsys)
    assert row["notes"] == [] and row["state"] == "cancelled"


def test_anothers_run_is_called_so_and_asked_for_by_its_owner(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = site.make()
    value = run.provenance() | {"user": "nobody"}
    run.provenance_file.write_text(json.dumps(value))
    site.say(waiting())
    assert only(capsys)["notes"] == ["it belongs to nobody"]
    assert "--user=nobody" in site.calls()[0]


def test_another_clusters_job_with_the_same_number_is_not_ours(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.make()
    site.say(waiting(prepare=("RUNNING", "None")), comment="ftlib another-run {stage} other-nonce")
    row = only(capsys)
    assert row["state"] == "failed" and "Slurm does not know its job" in row["words"]


def test_a_clock_that_jumps_neither_reorders_nor_takes_hours_back(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = site.make()
    site.say(waiting(**RUNNING))
    trained(run, 3)
    ahead = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=400)
    began = Started(stage="train", attempt=1, job_id="7", node="n7")
    ended = events.Ended(stage="train", attempt=1, code=0)
    with (run.events / "train-1.jsonl").open("w") as file:
        for event, at in ((began, ahead), (ended, ahead - datetime.timedelta(days=800))):
            file.write(json.dumps(events.to_row(event, at.isoformat())) + "\n")
    known = run.ledger()
    assert [type(event) for event in known.events][-2:] == [Started, events.Ended]
    assert sum(cost.seconds for cost in stage_costs(known, run.plan(), ahead.timestamp())) == 0
    assert "a clock is wrong, here or of n7" in only(capsys)["notes"][0]


def test_a_job_that_ends_between_the_look_at_its_folder_and_the_question_to_slurm_has_not_failed(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = site.make()
    for stage in STAGES[:-1]:
        outcome.write(run.outcomes, Outcome(stage, 1, 0, "done"))
    job = f"{ARRAYS[0]['evaluate']}_0"
    site.say({job: ("COMPLETED", "None")})
    # squeue is asked after the folder was read: the outcome is written while it answers.
    (site.place / "squeue.sh").write_text(f"echo '0 scored' >'{run.outcomes}/evaluate-1'\n")
    assert only(capsys)["state"] == "completed"
