"""The processes of a training find each other and prove that they can talk, before anything is loaded; or are named."""

import contextlib
import itertools
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from ftlib.errors import FtError
from ftlib.train import ranks

# Imports from a busy shared file system take minutes.
WAIT_S = float(os.environ.get("FT_RENDEZVOUS_S", "600"))
# Of one collective in training: rank 0 alone may be writing for long.
COLLECTIVE_S = 1800.0
# Ports tried one after the other, beginning with MASTER_PORT: another program may have taken some.
PORTS = 8
PROBE_BYTES = {"nccl": 64 << 20, "gloo": 4 << 20}
# Beside the median of all nodes.
SLOW = 3.0


def connect(*, on_gpu: bool, name: str, always: bool = False, wait_s: float = WAIT_S) -> None:
    """Make the process group of this job. Collective; nothing to do for one process, unless `always`.
    name: of this run and life, so that another job's port is not taken for ours. FtError names a rank that did not come
    within `wait_s`, or a node that is cut off; the log names a slow node."""
    if ranks.world_size() == 1:
        if not always:
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | address)
    deadline, timeout = time.monotonic() + wait_s, timedelta(seconds=COLLECTIVE_S)
    store = _serve(name) if ranks.rank() == 0 else _find(name, deadline, wait_s)
    ranks.store = store
    _roll_call(store, deadline, wait_s)
    group = {"rank": ranks.rank(), "world_size": ranks.world_size(), "timeout": timeout}
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, **group)
    if ranks.world_size() > 1:
        _preflight(store, deadline)


def here() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_of(rank: int) -> str:
    """' (node NAME)' of a rank that has said nothing yet, by Slurm's list; empty without one."""
    try:
        from submitit import JobEnvironment

        nodes, each = JobEnvironment().hostnames, int(os.environ["SLURM_NTASKS_PER_NODE"])
        return f" (node {nodes[rank // each]})"
    except (RuntimeError, KeyError, ValueError, IndexError):
        return ""


def _serve(name: str) -> dist.TCPStore:
    """The store, and a door that tells its port to who asks: a store's client would wait for a stranger for ever."""
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    first, taken = int(os.environ["MASTER_PORT"]), []
    for port in range(first, first + PORTS):
        try:
            door = socket.create_server(("", port))
        except OSError:
            taken.append(str(port))
            continue
        if taken:
            print(f"port {', '.join(taken)} in use on {here()}: the processes meet at {port}", flush=True)
        threading.Thread(target=_answer, args=(door, f"{name}\n{store.port}\n".encode()), daemon=True).start()
        return store
    raise FtError(f"ports {first} to {first + PORTS - 1} are in use on {here()}: the processes cannot meet")


def _answer(door: socket.socket, words: bytes) -> None:
    while True:
        asking, _ = door.accept()
        with asking, contextlib.suppress(OSError):
            asking.sendall(words)


def _find(name: str, deadline: float, wait_s: float) -> dist.TCPStore:
    address, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while time.monotonic() < deadline:
        for port in range(first, first + PORTS):
            with contextlib.suppress(OSError):  # Nobody there yet, or a stranger.
                with socket.create_connection((address, port), timeout=5) as door, door.makefile("rb") as said:
                    words = said.read(4096).decode(errors="replace").splitlines()
                if len(words) == 2 and words[0] == name:
                    return dist.TCPStore(address, int(words[1]), timeout=timedelta(seconds=COLLECTIVE_S))
        time.sleep(0.2)
    raise FtError(
        f"rank 0 on {address} did not open port {first} to {first + PORTS - 1} within {wait_s:.0f} s; "
        f"rank {ranks.rank()} on {here()} waited for it")


def _roll_call(store: dist.TCPStore, deadline: float, wait_s: float) -> None:
    """All ranks are here, or all that are leave with the names of those that are not."""
    store.set(f"here/{ranks.rank()}", here())
    world = range(ranks.world_size())
    if ranks.rank() == 0:
        missing = list(world)
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            if missing:
                time.sleep(0.05)
        named, came = ", ".join(f"rank {rank}{node_of(rank)}" for rank in missing), len(world) - len(missing)
        words = f"{named} did not arrive within {wait_s:.0f} s; {came} of {len(world)} processes did"
        store.set("all here", words if named else "")
    store.wait(["all here"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + 30))
    if words := store.get("all here").decode():
        raise FtError(words)


def _preflight(store: dist.TCPStore, deadline: float) -> None:
    """Each node's first rank exchanges a block with every other's; then all ranks sum one. Who fails is named."""
    nodes: dict[str, int] = {}
    for rank in range(ranks.world_size()):
        nodes.setdefault(store.get(f"here/{rank}").decode(), rank)
    names, leaders = list(nodes), list(nodes.values())
    block = torch.ones(PROBE_BYTES[dist.get_backend()] // 4, device=ranks.device())
    if ranks.rank() in leaders and len(names) > 1:
        place = leaders.index(ranks.rank())
        for turn in range(1, 1 << (len(names) - 1).bit_length()):
            if (other := place ^ turn) < len(names):
                taken = _exchange(block, leaders[other], deadline)
                store.set(f"pair/{min(place, other)}/{max(place, other)}", str(taken))
    if not _within(lambda: [dist.all_reduce(block, async_op=True)], deadline) or float(block[0]) != ranks.world_size():
        cut = [f"{a} and {b}" for (a, b), taken in _pairs(store, names).items() if taken is None]
        raise FtError(
            f"the processes are here, but cannot talk: {'; '.join(cut) or 'a sum over all ranks'} did not come through "
            f"(rank {ranks.rank()} on {here()}). Is the profile's NCCL_SOCKET_IFNAME right? Is a node cut off?")
    if ranks.rank() == 0 and (words := slow_words(_pairs(store, names))):
        print(words, flush=True)


def slow_words(pairs: dict[tuple[str, str], float | None]) -> str:
    """Which nodes are slow with all others, from the seconds each pair's exchange took; empty without any."""
    best: dict[str, float] = {}
    for pair, taken in pairs.items():
        for node in pair if taken is not None else ():
            best[node] = min(best.get(node, taken), taken)
    if len(best) < 3:
        return ""  # Of two nobody knows which.
    middle = statistics.median(best.values())
    slow = [f"{node} ({taken / middle:.1f} times the median)" for node, taken in best.items() if taken > SLOW * middle]
    return f"slow nodes in the network: {', '.join(slow)}; cluster.exclude leaves a node out" if slow else ""


def _pairs(store: dist.TCPStore, names: list[str]) -> dict[tuple[str, str], float | None]:
    found: dict[tuple[str, str], float | None] = {}
    for a, b in itertools.combinations(range(len(names)), 2):
        said = store.get(f"pair/{a}/{b}").decode() if store.check([f"pair/{a}/{b}"]) else "None"
        found[names[a], names[b]] = None if said == "None" else float(said)
    return found


def _exchange(block: torch.Tensor, other: int, deadline: float) -> float | None:
    """Seconds of the second of two exchanges (the first also connects); None where it did not come through."""
    got = torch.empty_like(block)
    for _ in range(2):
        began = time.monotonic()
        both = [dist.P2POp(dist.isend, block, other), dist.P2POp(dist.irecv, got, other)]
        if not _within(lambda both=both: dist.batch_isend_irecv(both), deadline):
            return None
    return time.monotonic() - began


def _within(start: Callable[[], list[Any]], deadline: float) -> bool:
    """Whether the asynchronous work that `start` begins is done in time."""
    try:
        for work in start():
            work.wait(timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except RuntimeError as error:
        print(f"rank {ranks.rank()} on {here()}: {error}", flush=True)
        return False
    return True
