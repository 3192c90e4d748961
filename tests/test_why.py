"""Why: the story of a run's lives."""

from __future__ import annotations

import datetime
import json

import pytest

from ftlib.runs.diagnosis import Cause
from ftlib.runs.events import Settled
from tests.seen import RUNNING, Site, shown, waiting


def test_why_shows_the_parts_of_a_restart(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = site.make()
    site.say(waiting(**RUNNING))
    now = datetime.datetime.now(datetime.timezone.utc)
    for number in (1, 2):
        (run.lives / f"train-{number}").write_text("1 n1 1700000000 \n")
    parts = {"imports_s": 5.0, "check_s": 0.5, "load_s": 3.0, "optimizer_s": 1.0, "first_step_s": 0.5}
    for number, name, after_s, fields in (
        (1, "interrupted", 0, {"signal_s": 1.5, "code": 75, "words": "interrupted (preemption), saved at step 40"}),
        (2, "first_step", 30, {"step": 41, **parts}),
    ):
        at = (now + datetime.timedelta(seconds=after_s)).isoformat()
        with (run.events / f"train-{number}.jsonl").open("a") as file:
            file.write(json.dumps({"time": at, "event": name, "stage": "train", "life": number, **fields}) + "\n")
    text = " ".join(shown(capsys, "why", "--run", run.name).split())
    assert (
        "first new step 31.5 s after the signal: saving 1.5, the queue 20.0, imports 5.0, data and checkpoint 0.5, "
        "model 3.0, optimizer 1.0, first step 0.5"
    ) in text


@pytest.mark.parametrize("cause", ["cancelled", "unknown"])
def test_why_does_not_repeat_what_a_process_only_guessed_of_its_signal(
    site: Site, capsys: pytest.CaptureFixture[str], cause: Cause
) -> None:
    (run,) = site.make()
    site.say(waiting(**RUNNING))
    (run.lives / "train-1").write_text("1 n1 1700000000 \n")
    run.outcomes.mkdir(exist_ok=True)
    (run.outcomes / "train-1").write_text("75 interrupted (preemption), saved at step 40\n")
    known = "SIGTERM, and nothing tells by whom"
    run.record(Settled(stage="train", attempt=1, job_id="1", cause=cause, by="epilogue", message=known))
    text = shown(capsys, "why", "--run", run.name)
    assert f"interrupted ({cause}), saved at step 40" in text and known in text
    assert "preemption" not in text
