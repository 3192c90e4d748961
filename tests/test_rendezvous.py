"""The processes of a training meet in spite of a taken port; whoever does not come is named, in time."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import started

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")

from torch import distributed as dist  # noqa: E402

from ftlib.errors import FtError, InputError, Interrupted  # noqa: E402
from ftlib.train import probe, ranks, rendezvous  # noqa: E402

pytestmark = pytest.mark.slow
MEET = """
import os
from torch import distributed as dist  # noqa: E402
from ftlib.errors import FtError, InputError  # noqa: E402
from ftlib.train import probe, ranks, rendezvous  # noqa: E402

def cut(*_):
    raise OSError("no route to host")

def fail():
    raise InputError(["one problem", "another"])

if os.environ.get("CUT") == os.environ["RANK"]:
    probe._fastest = cut
try:
    rendezvous.connect(on_gpu=False, name="this run")
    print("SUM", ranks.summed(1.0))
    print("GATHERED", ranks.gathered({"rank": ranks.rank(), "text": "é" * ranks.rank()}))
    ranks.first_alone(lambda: print("ALONE", ranks.rank()))
    ranks.first_alone(fail)
except FtError as error:
    print("ERROR", type(error).__name__, str(error), dist.is_initialized())
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
    gathered = [{"rank": rank, "text": "é" * rank} for rank in range(3)]
    assert all(f"GATHERED {gathered}" in words for words in said)
    assert not any("ALONE" in words for words in said[1:])
    assert all("ERROR InputError one problem\nanother True" in words for words in said), "rank 0's error reaches all"


def test_a_pair_that_is_cut_off_is_named_on_all_nodes_before_there_is_a_process_group(taken: int) -> None:
    said = processes(taken + 1, 0, 1, 2, world=3, CUT="1")
    for words in said:
        assert "ERROR FtError the processes are here, but cannot talk: n1 and n2 did not come through" in words
        assert words.rstrip().endswith("False"), "no process group was made"


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
    assert probe.slow_words({**pairs}).startswith("slow nodes in the network: c (8.4 times the median)")
    assert not probe.slow_words({pair: 1.0 for pair in pairs})
    assert not probe.slow_words({("a", "b"): 5.0}), "of two nobody knows which"


def test_the_address_of_the_interface_that_the_profile_names() -> None:
    def chosen(words: str) -> str:
        return probe.listen_address("10.0.0.7", variable="IFNAME", environment={"IFNAME": words})

    assert chosen("") == chosen("^docker,lo") == "10.0.0.7"
    assert chosen("lo") == chosen("=lo") == chosen("no-such,l") == "127.0.0.1"
    with pytest.raises(InputError, match=r"IFNAME==l: node .* has no such interface .* Allowed: .*lo"):
        chosen("=l")


def test_on_a_single_node_nobody_else_reaches_the_processes(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken + 2), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    def listening() -> set[tuple[str, int]]:
        return {tuple(c.laddr) for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}

    before = listening()
    store = rendezvous._serve("a run")
    added = listening() - before
    assert len(added) == 2 and {address for address, _ in added} == {"127.0.0.1"}
    assert store.port in {port for _, port in added}


class _Harmful:
    """A pickle that would run code where it is loaded."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_what_a_stranger_writes_into_the_store_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(ranks, "store", store)
    monkeypatch.setattr(ranks, "_turns", itertools.count())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    nested = "[" * 100_000
    strange = [pickle.dumps(_Harmful()), b"", b"[]", b"3", b'{"kind": "SystemExit", "message": "x"}', nested.encode()]
    for turn, message in enumerate([*strange, b" " * (ranks.ERROR_BYTES + 1)]):
        store.set(f"alone/{turn}", message)
        with pytest.raises(FtError, match="is not readable"):
            ranks.first_alone(lambda: None)
        with pytest.raises(FtError, match="is not readable"):
            probe.read_entry(message)


@pytest.mark.parametrize("error", [InputError(["one", "two"]), FtError("x" * 200_000), Interrupted("preemption", 7)])
def test_an_error_of_rank_0_is_the_same_error_elsewhere(error: FtError) -> None:
    message = ranks._error_to_text(error).encode()
    found = ranks._error_from_text(message)
    assert type(found) is type(error) and len(message) <= ranks.ERROR_BYTES
    assert str(error).startswith(str(found)) and (len(str(error)) > 1000 or str(found) == str(error))
    assert ranks._error_from_text(ranks._error_to_text(None).encode()) is None


def test_no_rank_unpickles_what_another_sends() -> None:
    """torch's *_object collectives pickle; so does nothing of ours."""
    for path in Path(ranks.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) pickle|_object(_list)?\(", text, re.MULTILINE), path


def test_nccl_gets_its_device_and_a_set_up_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: seen.update(how, backend=backend))
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu"))
    rendezvous._make_group(dist.HashStore(), on_gpu=True)
    assert seen["backend"] == "nccl" and seen["device_id"] == seen["device"] == torch.device("cuda", 1)
    assert seen["timeout"].total_seconds() == rendezvous.COLLECTIVE_S

    monkeypatch.setattr(rendezvous, "GROUP_S", 0.1)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: time.sleep(30))
    with pytest.raises(FtError, match="but cannot talk: nccl over all ranks was not ready within 0 s"):
        rendezvous._make_group(dist.HashStore(), on_gpu=True)
