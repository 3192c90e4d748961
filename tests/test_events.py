"""Events are stored as JSON lines and read back as what they were, also those of the first release."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from ftlib.runs import events, ledger, overrides
from ftlib.runs.events import KINDS, Cancelled, Ended, Override, ResumeRequested, Settled, Submitted
from ftlib.runs.folder import RunFolder

VALUES = {"int": 3, "str": "a b", "float": 1.5, "bool": True}


def example(kind: type[events.Event]) -> events.Event:
    """An event of the class with a value in each field."""
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in ("time", "writer"):
            continue
        name = str(field.type).replace(" | None", "")
        known = {"Choice": "stop", "Settler": "epilogue", "Any": {"a": 1}, "tuple[str, ...]": ("one",)}
        known |= {"Mapping[str, float]": {"load_s": 1.5}, "Mapping[str, int]": {"train": 2}}
        values[field.name] = VALUES.get(name, known.get(name))
    return kind(**values)


def test_every_kind_of_event_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = [example(kind) for kind in KINDS.values()]
    events.append(tmp_path / "events", "train-1", *written)
    plain = [dataclasses.replace(event, time=0.0, writer="") for event in events.read(tmp_path / "events")]
    assert plain == written


def test_a_cut_line_an_unknown_kind_and_a_later_field_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    events.append(folder, "a", Submitted(stage="train", job_id="7"))
    row = {"format": 3, "time": "2026-11-21T00:00:00+00:00", "event": "cancelled", "stage": "train", "later": 1}
    with (folder / "b.jsonl").open("w") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "event": "of a later version"}) + '\n{"format": 2, "ti')
    assert [type(event) for event in events.read(folder)] == [Cancelled, Submitted]


def test_events_of_the_first_release_are_read(tmp_path: Path) -> None:
    rows = {
        "submit-a-1": [{"event": "submitted", "stage": "train", "job_id": 7, "nonce": "n", "after_life": 2}],
        "train-3": [{"event": "interrupted", "stage": "train", "life": 3, "code": 75, "words": "saved"}],
        "train-3-epilogue": [
            {"event": "requeued", "stage": "train", "life": 3, "job_id": "7", "cause": "preemption", "words": "again"}
        ],
        "submit-b-2": [{"event": "submitted", "stage": "guard", "job_id": "9"}],
    }
    (tmp_path / "events").mkdir()
    for second, (writer, of_writer) in enumerate(rows.items()):
        lines = [json.dumps({"time": f"2026-08-01T00:00:0{second}+00:00", **row}) for row in of_writer]
        (tmp_path / "events" / f"{writer}.jsonl").write_text("\n".join(lines))
    submitted, ended, settled, recovery = events.read(tmp_path / "events")
    assert isinstance(submitted, Submitted) and submitted.after_attempt == 2
    assert isinstance(ended, Ended) and (ended.attempt, ended.code, ended.message) == (3, 75, "saved")
    assert isinstance(settled, Settled) and (settled.cause, settled.by) == ("preemption", "epilogue")
    assert isinstance(recovery, Submitted) and recovery.stage == ledger.RECOVERY


def test_what_follows_from_an_event_is_later_whatever_the_clock_says(tmp_path: Path) -> None:
    """The login node's clock is an hour ahead of the node's on which the recovery job queues the run anew."""
    run = RunFolder(tmp_path)
    ahead = time.time() + 3600
    events.append(tmp_path / "events", "submit-login", Submitted(stage="train", job_id="7"), not_before=ahead)
    run.record(Submitted(stage="train", job_id="8"), writer="submit-node")
    assert run.ledger().jobs == {"train": "8"}


def test_a_cancelled_job_stays_cancelled_and_a_stage_without_one_until_a_resume() -> None:
    known = ledger.Ledger().with_events(
        Submitted(stage="train", job_id="7"), Cancelled(stage="train", job_id="7"), Cancelled(stage="export")
    )
    assert known.cancelled("train", "7") and known.cancelled("export", "") and not known.cancelled("train", "8")
    resumed = known.with_events(ResumeRequested())
    assert resumed.cancelled("train", "7") and not resumed.cancelled("export", "")
    assert resumed.resume_pending("train") and not known.resume_pending("train")


def test_overrides_hold_until_their_time_and_the_last_one_counts() -> None:
    history = [
        Override(field="train.micro_batch", value=4, who="epilogue", why="GPU memory"),
        Override(field="train.micro_batch", value=2, who="epilogue", why="GPU memory"),
        Override(field="exclude.n1", value=True, who="epilogue", why="Xid", until=100.0),
        Override(field="exclude.n2", value=True, who="epilogue", why="Xid", until=200.0),
        Override(field="cluster.qos", value="group-b", who="ada", why="make resume"),
    ]
    now = overrides.fold(history, now=150.0)
    assert (now.micro_batch, now.excluded, now.cluster) == (2, ("n2",), {"qos": "group-b"})
    assert overrides.fold(history, now=50.0).excluded == ("n1", "n2") and len(now.history) == 5
