"""Every format in which a run was ever recorded stays readable: `ledgers/format-N` is a real run folder of each.

Both runs met the same on the local Slurm. Of the training, GPU memory ran out in attempt 1 and a GPU was faulty in
attempt 2 (their logs are real ones), attempt 3 was requeued by hand, the batch shell of attempt 4 was killed, so that
the recovery job settled and queued anew, and attempt 5 came to the end. Formats are added here, and none is taken away.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib.report.cost import stage_costs
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import ledger
from ftlib.runs.events import CheckpointSaved, Decided, Ended, FirstStep, Intended, Resumed, Settled, Started, Submitted
from ftlib.runs.ledger import RECOVERY

FORMATS = ("format-1", "format-2")


@pytest.fixture(params=FORMATS)
def run(request: pytest.FixtureRequest) -> RunDir:
    return RunDir(Path(__file__).parent / "ledgers" / request.param)


def test_nothing_that_was_written_is_passed_over(run: RunDir) -> None:
    lines = [line for file in run.events.glob("*.jsonl") for line in file.read_text().splitlines()]
    from_adjustments = 2 if run.name == "format-1" else 0
    assert len(run.ledger().events) == len(lines) + from_adjustments


def test_jobs_and_their_intents(run: RunDir) -> None:
    known = run.ledger()
    assert known.jobs.keys() == {*STAGES, RECOVERY}
    first, again = known.of(Submitted, "train")
    assert (first.automatic, again.automatic, again.after_attempt) == (False, True, 4)
    assert known.jobs["train"] == again.job_id != first.job_id
    assert {event.nonce for event in known.of(Submitted)} == {event.nonce for event in known.of(Intended)}
    assert known.request_index("train") == known.events.index(first)


def test_attempts_and_their_ends(run: RunDir) -> None:
    known = run.ledger()
    assert {stage: known.attempt_count(stage) for stage in STAGES} == dict.fromkeys(STAGES, 1) | {"train": 5}
    assert known.first_open is None
    third = known.attempt("train", 3)
    assert third.node == "n1" and third.began and third.log_starts == {f"{third.job_id}_0_log.out": 1078}
    assert [outcome.code for outcome in known.outcomes["train"]] == [75, 75, 0]
    assert [(ended.attempt, ended.code) for ended in known.of(Ended, "train")] == [(3, 75), (4, 75), (5, 0)]
    assert [started.attempt for started in known.of(Started, "train")] == [3, 4, 5]
    assert [known.progressed("train", number) for number in range(1, 6)] == [False, False, True, True, True]


def test_causes_and_who_found_them(run: RunDir) -> None:
    settled = run.ledger().settled("train")
    assert {number: one.cause for number, one in settled.items()} == {
        1: "GPU memory", 2: "bad GPU", 3: "by hand", 4: "killed"
    }  # fmt: skip
    assert [one.by for one in settled.values()] == ["epilogue", "epilogue", "epilogue", "recovery job"]
    assert settled[4].ended and not settled[3].ended
    assert "CUDA out of memory" in settled[1].line and settled[1].code == 1


def test_where_the_training_resumed(run: RunDir) -> None:
    known = run.ledger()
    for resumed in known.of(Resumed, "train"):
        before = [saved.step for saved in known.of(CheckpointSaved, "train") if saved.attempt < resumed.attempt]
        assert resumed.step == max(before, default=0)
    first_step = known.last(FirstStep, "train", 5)
    assert first_step and {"imports_s", "load_s", "first_step_s"} <= first_step.parts_s.keys()


def test_overrides_and_the_plan_that_follows_from_them(run: RunDir) -> None:
    known = run.ledger()
    halved, excluded = known.overrides(now=0.0).history
    assert (halved.field, halved.value, excluded.field) == ("train.micro_batch", 2, "exclude.n2")
    assert "CUDA out of memory" in halved.why and "ECC" in excluded.why
    assert excluded.until
    assert known.overrides(excluded.until - 60).excluded == ("n2",)
    assert known.overrides(excluded.until + 60).excluded == ()
    planned, numerics = run.plan(), run.numerics()
    assert (planned["micro_batch"], planned["accumulation"]) == (4, 2)
    assert (numerics.micro_batch, numerics.accumulation) == (2, 4)


def test_costs(run: RunDir) -> None:
    known = run.ledger()
    costs = {cost.stage: cost for cost in stage_costs(known, run.plan(), now=known.events[-1].time + 3600)}
    assert costs.keys() == {*STAGES}
    # Attempts 1 and 2 of the training never came to their own code.
    assert {stage: cost.lives for stage, cost in costs.items()} == dict.fromkeys(STAGES, 1) | {"train": 3}
    ends = known.of(Ended, "train")
    own = sum(ended.time - started.time for started, ended in zip(known.of(Started, "train"), ends, strict=True))
    # Accounting counts whole seconds; an epilogue takes some.
    assert own - 2 <= costs["train"].seconds < own + 10
    assert costs["train"].lost_seconds < 5, "each had saved"


def test_decisions_are_recorded_since_format_2() -> None:
    known = ledger.read(Path(__file__).parent / "ledgers" / "format-2")
    decided = [(one.attempt, one.choice) for one in known.of(Decided, "train") if one.writer.endswith("-epilogue")]
    assert decided == [(1, "requeue"), (2, "requeue"), (3, "requeue")]
    assert {one.writer for one in known.of(Settled) if one.by == "epilogue"} == {
        f"train-{number}-epilogue" for number in (1, 2, 3)
    }
