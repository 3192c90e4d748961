"""Kills of several kinds in one run on a real Slurm: what comes out is the run that nothing touched, bit for bit.

`make chaos` does sixty, at more places and on two nodes; this is the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from benchmarks.chaos import slurm as cluster
from benchmarks.chaos.campaign import FLAVOURS, Ground, attack, judge
from benchmarks.chaos.kinds import KINDS
from tests.cluster import Slurm

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

WANTED = [
    ("SIGKILL of the batch shell", "prepare", "data preparation"),
    ("node down", "train", "warm-up"),
    ("preemption with grace", "train", "a step"),
    ("USR2 by hand", "train", "accumulation"),
    ("SIGKILL of a worker", "train", "checkpoint write"),
    ("scontrol requeue", "export", "export"),
    ("SIGKILL of the step", "evaluate", "answers of the tuned model"),
]

# One that no epilogue sees the end of, one in the middle of a commit, and one that evaluation resumes from.
QUICK = [kill for kill in WANTED if kill[0] in ("node down", "SIGKILL of a worker", "SIGKILL of the step")]


@pytest.fixture
def healed(slurm: Slurm) -> Iterator[None]:
    """The cluster as it was, whatever a kill left of it."""
    cluster.heal()
    yield
    cluster.heal()


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(QUICK, id="three"),
        pytest.param(WANTED, id="seven", marks=pytest.mark.nightly),
    ],
)
def test_kills_change_nothing(healed: None, tmp_path: Path, wanted: list[tuple[str, str, str]]) -> None:
    ground, flavour = Ground(tmp_path / "checkout"), next(iter(FLAVOURS))
    reference = ground.submit(flavour)
    assert ground.finish(reference) == "completed"
    run, kills = attack(ground, flavour, wanted, Random(0))
    result = judge(ground, run, flavour, kills, reference)
    assert (result.state, result.differences) == ("completed", [])
    assert [kill.kind for kill in kills] == [kind for kind, _, _ in wanted]
    assert {kill.kind: kill.cause for kill in kills if not kill.right} == {}
    assert sum(kill.lost for kill in kills if KINDS[kill.kind].warned) == 0
