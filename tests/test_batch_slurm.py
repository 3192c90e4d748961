"""The shell around a stage on a real Slurm: waiting without a node, a killed slurmstepd, what tasks inherit."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlib.slurm import batch
from ftlib.slurm.controller import SlurmController
from tests.cluster import Slurm
from tests.wishes import CHECKOUT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def queue(slurm: Slurm, run: Path, command: str, *options: str) -> str:
    """Queue a job that runs `command` between prologue and epilogue; returns its id."""
    for folder in ("events", "outcomes", "lives", "slurm/train"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    (run / "plan.json").write_text('{"micro_batch": 8, "accumulation": 2}')
    variables = {"FT_RUN": str(run), "FT_STAGE": "train", "FT_REQUEUE": "1", "FT_PYTHON": sys.executable}
    lines = ["#!/bin/bash", f"unset {' '.join(batch.NOT_INHERITED)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [f"cd {shlex.quote(str(CHECKOUT))}", ". slurm_templates/prologue.sh", command]
    script = run / "job.sh"
    script.write_text("\n".join([*lines, ". slurm_templates/epilogue.sh", ""]))
    log = f"--output={run}/slurm/train/%j_0_log.out"
    return slurm.sbatch("--requeue", "--open-mode=append", "--mem=200M", "--time=9", log, *options, str(script))


def log(run: Path) -> str:
    return "\n".join(path.read_text() for path in (run / "slurm" / "train").glob("*.out"))


def until(check: Callable[[], Any], timeout_s: float, run: Path) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.3)
    return found


def test_a_job_that_waits_before_its_next_attempt_holds_no_node(slurm: Slurm, tmp_path: Path) -> None:
    job = queue(slurm, tmp_path, 'echo "OSError: [Errno 116] Stale file handle"; (exit 1)')
    try:
        slurm.wait(job, "PENDING", 30)
        until(lambda: "requeue" in log(tmp_path).lower(), 30, tmp_path)
        slurm.wait(job, "PENDING", 30)  # the epilogue has been taken back
        state, reason, begins, now = slurm.run(
            ["bash", "-c", f"squeue -h -j {job} -o '%T %r %S'; date +%FT%T"]
        ).split()
        assert (state, reason) == ("PENDING", "BeginTime")
        left = slurm.run(["bash", "-c", f"echo $(($(date -d {begins} +%s) - $(date -d {now} +%s)))"])
        assert 12 < int(left) <= 30, left  # the credential's 10 s alone would be less
    finally:
        slurm.run(["scancel", job])


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_change_is_accepted_only_of_a_job_that_goes_back_to_the_queue(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """What `act.requeue` relies on: of a job that was cancelled, `requeue Incomplete` is accepted without effect."""
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "job.sh"
    # It outlives SIGTERM, so that it is still ending when the requeue comes.
    script.write_text("#!/bin/bash\ntrap '' TERM\ntouch ready\nfor _ in $(seq 600); do sleep 0.1; done\n")
    job = slurm.sbatch(
        "--requeue", "--mem=200M", "--time=9", f"--chdir={tmp_path}", "--output=/dev/null", str(script)
    )  # fmt: skip
    controller = SlurmController()
    try:
        until((tmp_path / "ready").exists, 30, tmp_path)
        assert controller.restarts(job) == 0
        if cancelled:
            slurm.run(["scancel", job])
        assert controller.requeue(job, incomplete_only=True)
        assert controller.update(job, {"Requeue": "1"}) is not cancelled
        assert controller.restarts(job) == (0 if cancelled else 1)
        slurm.wait(job, "CANCELLED" if cancelled else "PENDING", 30)
    finally:
        slurm.run(["scancel", job])


def test_a_step_whose_daemon_was_killed_is_ended_and_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    job = queue(slurm, tmp_path, "srun sleep 300")

    def daemon() -> list[str]:
        named = ["pgrep", "-f", rf"^slurmstepd: \[{job}\.0\]"]
        return subprocess.run(named, capture_output=True, text=True, timeout=9).stdout.split()

    try:
        pids = until(daemon, 60, tmp_path)
        time.sleep(3)  # the watch has seen the step
        began = time.monotonic()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        until(lambda: "slurmstepd is gone" in log(tmp_path), 60, tmp_path)
        until(lambda: "the process was killed" in log(tmp_path), 60, tmp_path)
        assert time.monotonic() - began < 60
        assert not subprocess.run(["pgrep", "-f", "^sleep 300$"], capture_output=True, timeout=9).stdout
    finally:
        slurm.run(["scancel", job])


def test_tasks_get_the_jobs_variables_and_none_of_the_login_shells_libraries(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SBATCH_EXPORT=NONE, which some sites set, would have srun start tasks without FT_RUN."""
    for name, value in {"SBATCH_EXPORT": "NONE", "LD_LIBRARY_PATH": "/login/lib"}.items():
        for export in ("ALL", "NONE"):
            run = tmp_path / f"{name}{export}"
            run.mkdir()
            monkeypatch.setitem(slurm.env, name, value)
            done = "(echo '0 done' >\"$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE\")"
            job = queue(slurm, run, f"srun env; {done}", *([f"--export={export}"] if name != "SBATCH_EXPORT" else []))
            slurm.wait(job, "COMPLETED", 60)
            assert re.search(r"^FT_RUN=", log(run), re.M) and "/login/lib" not in log(run)
