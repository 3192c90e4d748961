"""The processes of a training meet in spite of a taken port; whoever does not come is named, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import started

pytest.importorskip("torch", reason="training needs torch: the train extra")

from ftlib.train import rendezvous

pytestmark = pytest.mark.slow
MEET = """
from ftlib.errors import FtError
from ftlib.train import ranks, rendezvous

try:
    rendezvous.connect(on_gpu=False, name="this run")
    print("SUM", ranks.summed(1.0))
    ranks.first_alone(lambda: print("ALONE", ranks.rank()))
except FtError as error:
    print("ERROR", error)
"""


def processes(port: int, *present: int, world: int = 2, wait_s: float = 60, **names: str) -> list[str]:
    """What the ranks that are present print."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"FT_RENDEZVOUS_S": str(wait_s), "PYTHONPATH": str(Path(__file__).parents[1]), **names}
    with ExitStack() as running:
        ranks = [
            running.enter_context(started(
                [sys.executable, "-c", MEET],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ))
            for rank in present
        ]  # fmt: skip
        return [process.communicate(timeout=180)[0] for process in ranks]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where a stranger listens and says nothing."""
    with socket.socket() as stranger:
        stranger.bind(("", 0))
        stranger.listen()
        yield stranger.getsockname()[1]


def test_three_nodes_meet_beside_a_taken_port(taken: int) -> None:
    said = processes(taken, 0, 1, 2, world=3)
    assert f"port {taken} in use on n0: the processes meet at" in said[0]
    assert all("SUM [3.0]" in words for words in said) and "ALONE 0" in said[0]
    assert not any("ERROR" in words or "ALONE" in words for words in said[1:])


def test_who_does_not_come_is_named_with_its_node(taken: int) -> None:
    slurm = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    (said,) = processes(taken + 1, 0, world=4, wait_s=3, **slurm)
    assert (
        "rank 1 (node n1), rank 2 (node n2), rank 3 (node n2) did not arrive within 3 s; 1 of 4 processes did" in said
    )
    (said,) = processes(taken + 1, 1, wait_s=3)
    assert "rank 0 on 127.0.0.1 did not open port" in said and "within 3 s; rank 1 on n1 waited for it" in said


def test_a_node_that_is_slow_with_all_others_is_named_and_its_partners_are_not() -> None:
    pairs = {("a", "b"): 1.0, ("a", "c"): 9.0, ("a", "d"): 1.1, ("b", "c"): 8.0, ("b", "d"): 0.9, ("c", "d"): 9.0}
    assert rendezvous.slow_words({**pairs}).startswith("slow nodes in the network: c (8.4 times the median)")
    assert not rendezvous.slow_words({pair: 1.0 for pair in pairs})
    assert not rendezvous.slow_words({("a", "b"): 5.0}), "of two nobody knows which"
