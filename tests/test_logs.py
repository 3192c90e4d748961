"""Logs: the newest life alone, or every life as it comes; and how watching ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time

import pytest

from benchmarks.status import status
from ftlib.rundir import STAGES
from ftlib.runs import outcome
from ftlib.runs.outcome import Outcome
from jobs import cli, logs
from tests.processes import started
from tests.seen import ARRAYS, RUNNING, Site, life, waiting
from tests.wishes import CHECKOUT


def test_logs_shows_the_newest_life_alone(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    (run,) = site.make()
    site.say(waiting())
    assert cli.main(["logs", "--run", run.name]) == 0
    assert "no log yet. prepare is queued: jobs of higher priority" in capfd.readouterr().out
    life(run, "prepare", 1, "preparing\n", at=100)
    life(run, "train", 1, "first life\n", at=200)
    path = life(run, "train", 2, "second life\n", at=300)
    os.utime(run.slurm / "prepare" / f"{ARRAYS[0]['prepare']}_0_0_log.out")  # written last, and not the newest life
    assert cli.main(["logs", "--run", run.name]) == 0
    out = capfd.readouterr()
    assert out.out == "second life\n" and out.err == f"==> train, life 2: {path}\n"
    assert cli.main(["logs", "--run", run.name, "--stage", "prepare"]) == 0
    assert capfd.readouterr().out == "preparing\n"


def test_logs_follow_across_lives_and_stages_to_the_end(
    site: Site, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "EVERY_S", 0.02)
    (run,) = site.make()
    site.say(waiting(**RUNNING))
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, ""))
    life(run, "train", 1, "one\n", at=100)
    out = err = ""

    def until(text: str) -> None:
        nonlocal out, err
        deadline = time.monotonic() + 30
        while text not in out + err:
            assert time.monotonic() < deadline, (text, out, err)
            time.sleep(0.05)
            more = capfd.readouterr()
            out, err = out + more.out, err + more.err

    follower = threading.Thread(target=cli.main, args=(["logs", "--run", run.name, "--follow"],))
    follower.start()
    until("one\n")
    life(run, "train", 2, "two\n", at=200)
    until("two\n")
    life(run, "train", 2, "three\n", at=200)
    for number, stage in enumerate(STAGES[1:]):
        life(run, stage, 2, f"end of {stage}\n", at=300 + number)
        until(f"end of {stage}\n")
        outcome.write(run.outcomes, Outcome(stage, 2, 0, ""))
    follower.join(30)
    assert not follower.is_alive()
    until(f"{run.name}: completed")
    assert out == "one\ntwo\nthree\nend of train\nend of export\nend of evaluate\n"
    assert re.findall(r"==> (\w+, life \d)", err) == [
        "train, life 1",
        "train, life 2",
        "export, life 2",
        "evaluate, life 2",
    ]


@pytest.mark.parametrize("words", [["logs", "--follow"], ["status", "--watch"]])
def test_ctrl_c_ends_it_without_a_word(site: Site, words: list[str]) -> None:
    (run,) = site.make()
    site.say(waiting(**RUNNING))
    outcome.write(run.outcomes, Outcome("prepare", 1, 0, ""))
    life(run, "train", 1, "working\n", at=100)
    command = [*status(site.runs)[:-1], *words, "--run", run.name]
    with started(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err
