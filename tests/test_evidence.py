"""What is gathered of an attempt's end: real answers of Slurm's commands, and the attempt's own part of its logs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ftlib.rundir import RunDir
from ftlib.runs.diagnosis import Accounted, Controller, Evidence, cause_of
from ftlib.runs.events import Cancelled
from ftlib.slurm import evidence
from tests.wishes import CHECKOUT

BEGAN = 1_795_286_759
JOB = "55286628"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder whose second attempt of two has begun; Slurm's commands do not answer."""
    folder = tmp_path / "tiny-0123abcd"
    for name in ("events", "outcomes", "lives", "slurm/train"):
        (folder / name).mkdir(parents=True)
    stage = {"nodes": 2, "tasks_per_node": 1, "time_min": 60, "warning_s": 300}
    (folder / "plan.json").write_text(json.dumps({"stages": {"train": stage}}))
    (folder / "lives/train-1").write_text(f"{JOB} n2 {BEGAN} \n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith(("SLURM", "FT_"))]:
        monkeypatch.delenv(name)
    answers(folder, "sacct", "Slurm accounting storage is disabled", code=1)
    answers(folder, "scontrol", "slurm_load_jobs error: Unable to contact slurm controller", code=1)
    return RunDir(folder)


def answers(run: Path, command: str, text: str, code: int = 0) -> None:
    """A command that says `text`, whatever it is asked."""
    (run.parent / f"{command}.txt").write_text(text + "\n")
    tool = run.parent / "bin" / command
    tool.write_text(f"#!/bin/sh\ncat '{run.parent}/{command}.txt'\nexit {code}\n")
    tool.chmod(0o755)


def gathered(run: RunDir, number: int = 1) -> Evidence:
    return evidence.gather(run.path, run.ledger(), "train", number)


# What sacct -D printed on the local Slurm 22.05.8, as JobID|State|ExitCode|Start|End. A job that `scontrol requeue`
# took back has lost its start for a while; its batch step has it still.
BY_HAND = f"""{JOB}|REQUEUED|0:0|None|1795286760
{JOB}.batch|CANCELLED|0:9|1795286759|1795286765
{JOB}.0|FAILED|75:0|1795286760|1795286760
{JOB}|RUNNING|0:0|1795286772|Unknown
{JOB}.batch|RUNNING|0:0|1795286772|Unknown"""
CANCELLED_AS_IT_WAITED = f"""{JOB}|NODE_FAIL|0:0|1795286759|1795286764
{JOB}.batch|CANCELLED||1795286759|1795286764
{JOB}|CANCELLED by 0|0:0|1795286790|1795286790"""
SHELL_KILLED = f"""{JOB}|FAILED|0:9|1795286759|1795286760
{JOB}.batch|CANCELLED|0:9|1795286759|1795286760
{JOB}.0|FAILED|75:0|1795286759|1795286760"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BY_HAND, Accounted(state="REQUEUED", ended=1795286760, shell_signal=0)),
        (CANCELLED_AS_IT_WAITED, Accounted(state="NODE_FAIL", ended=1795286764, shell_signal=0)),
        (SHELL_KILLED, Accounted(state="FAILED", ended=1795286760, shell_signal=9)),
        ("", None),
        ("Slurm accounting storage is disabled", None),
    ],
)
def test_accounting_is_read_for_the_very_attempt(run: RunDir, text: str, expected: Accounted | None) -> None:
    answers(run.path, "sacct", text)
    assert gathered(run).accounted == expected
    assert gathered(run).ended == (expected.ended if expected else None)


CANCELLED_NOW = (
    f"JobId={JOB} JobName=job.sh UserId=root(0) JobState=COMPLETING Reason=None Requeue=1 Restarts=0 ExitCode=0:0 "
    "RunTime=00:00:02 StartTime=1795286755 EndTime=1795286757 PreemptEligibleTime=1795286755 PreemptTime=None"
)
REQUEUED_NOW = f"JobId={JOB} JobState=COMPLETING Reason=None Restarts=1 ExitCode=0:0 StartTime=Unknown EndTime=Unknown"
PREEMPTED_NOW = (
    f"JobId={JOB} JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0 StartTime=1795286766 EndTime=1795286776 "
    "PreemptEligibleTime=1795286766 PreemptTime=1795286766"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CANCELLED_NOW, Controller(state="COMPLETING", reason="None", started=1795286755, ends=1795286757, restarts=0,
                                   shell_signal=0)),
        (REQUEUED_NOW, Controller(state="COMPLETING", reason="None", restarts=1, shell_signal=0)),
        (PREEMPTED_NOW, Controller(state="RUNNING", reason="None", started=1795286766, ends=1795286776, restarts=0,
                                   preempted=1795286766, shell_signal=0)),
        ("slurm_load_jobs error: Invalid job id specified", None),
    ],
)  # fmt: skip
def test_the_controller_is_read(run: RunDir, text: str, expected: Controller | None) -> None:
    answers(run.path, "scontrol", text)
    assert gathered(run).controller == expected


def test_accounting_that_is_late_says_nothing_of_the_newest_attempt() -> None:
    """Its newest row is of the start before, which our own epilogue had requeued."""
    text = f"{JOB}|REQUEUED|0:0|1795286700|1795286760"
    assert evidence.accounted_in(text, 1795286880) is None
    both = f"{text}\n{JOB}|RUNNING|0:0|1795286880|Unknown"
    assert evidence.accounted_in(both, 1795286880) == Accounted(state="RUNNING", shell_signal=0)


def test_what_a_later_start_of_the_job_wrote_is_not_of_the_attempt() -> None:
    """That start ended before it had an attempt of its own, and the log is the job's."""
    own = "ftlib: start 1 of job 7, on n1\n"
    assert evidence.until_restart(f"{own}ftlib: start 2 of job 7, on n2\nDUE TO PREEMPTION") == own
    assert evidence.until_restart("first\n" + own) == "first\n" + own


def test_where_nobody_answers_the_evidence_is_the_folders_alone(run: RunDir) -> None:
    known = gathered(run)
    assert (known.accounted, known.controller, known.outcome_code) == (None, None, None)
    assert (known.ranks, known.warning_s, known.planned_end) == (2, 300, BEGAN + 3600)
    assert cause_of(known).cause == "unknown"


def test_the_warning_is_that_of_the_script_that_ran(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose saves were slow is warned earlier than its plan says."""
    script = run.path.parent / "job.sh"
    prologue = CHECKOUT / "slurm_templates/prologue.sh"
    lines = ["#!/bin/bash", "#SBATCH --signal=USR2@444", f". {prologue}", "kill $FT_WATCH", "echo lead $FT_WARNING_S"]
    script.write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "FT_RUN": str(run.path), "FT_STAGE": "export", "SLURM_JOB_ID": "9"}
    (run.slurm / "export").mkdir()
    done = subprocess.run(
        ["bash", str(script)], env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )
    assert "lead 444" in done.stdout, done.stderr
    monkeypatch.setenv("FT_WARNING_S", "444")
    assert evidence.gather(run.path, run.ledger(), "train", 1, epilogue=True).warning_s == 444
    # Another process knows the plan's alone.
    assert gathered(run).warning_s == 300


def test_an_attempts_log_ends_where_the_next_one_begins(run: RunDir) -> None:
    file = run.slurm / f"train/{JOB}_0_log.out"
    first, second = "srun: error: n2: task 0: Killed\n", "CUDA out of memory\n"
    file.write_text(first + second)
    (run.lives / "train-2").write_text(f"{JOB} n2 {BEGAN + 60} {file.name}:{len(first)}\n")
    assert gathered(run, 1).logs == {0: first}
    assert gathered(run, 2).logs == {0: second}
    assert cause_of(gathered(run, 1)).cause == "killed"
    # Another job has other logs.
    (run.lives / "train-2").write_text(f"9 n2 {BEGAN + 60} \n")
    assert gathered(run, 1).logs == {0: first + second}


def test_a_recorded_cancellation_is_of_this_job_and_stage(run: RunDir) -> None:
    run.record(Cancelled(stage="export", job_id=JOB), Cancelled(stage="train", job_id="9"))
    assert gathered(run).cancelled_at is None
    run.record(Cancelled(stage="train", job_id=JOB))
    assert gathered(run).cancelled_at is not None
