"""ZeRO 1, 2 and 3 in bf16 with fp32 gradients, as on GPUs, in two processes on a CPU: resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed: the train extra")

from benchmarks.lives import sha
from ftlib import checkpoint
from ftlib.rundir import RunDir
from tests.test_train import trajectory, write_base, write_dataset, write_run
from tests.test_train_ranks import live
from tests.wishes import set_numerics

pytestmark = pytest.mark.slow
STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero-bf16")
    write_base(folder / "base")
    (folder / "data").mkdir()
    write_dataset(folder / "data")
    return folder


def in_bf16(place: Path, name: str, stage: int) -> RunDir:
    """A run of full fine-tuning whose plan computes as on a GPU. Two groups of weights differ in their decay."""
    train: dict[str, Any] = {"steps": STEPS, "eval_every_steps": 3, "save_every_steps": None}
    run = write_run(
        place / f"{stage}-{name}" / "the-run", place / "base", place / "data", train=train, method={"kind": "full"},
        zero={"stage": stage}, optim={"weight_decay": 0.1},
    )  # fmt: skip
    set_numerics(run, compute_dtype="bfloat16")
    return run


# Stage 1 has an optimizer of its own in bf16 (BF16_Optimizer); 2 and 3 have that of float32.
@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.nightly) for stage in (2, 3))])
def test_zero_in_bf16_resumes_to_the_bit(place: Path, stage: int) -> None:
    whole, halved = in_bf16(place, "whole", stage), in_bf16(place, "halved", stage)
    live(whole, 1)
    said = live(halved, 1, stop_after=STOP)
    assert all(f"STOPPED {STOP} preemption" in words for words in said), said
    assert "not quantised, bfloat16" in said[0]
    live(halved, 2)
    assert trajectory(halved) == trajectory(whole)
    losses = [row[1] for row in trajectory(whole) if row[1] is not None]
    assert losses[-1] < losses[0]
    ends = [checkpoint.folder_for(run.checkpoints, STEPS) for run in (whole, halved)]
    assert sha(ends[0]) == sha(ends[1])
