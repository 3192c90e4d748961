"""The processes of a training find each other and prove that they can talk, before anything is loaded; or are named.

First they meet at a store of rank 0 (torch's TCPStore). Then each pair of nodes exchanges data over TCP (probe.py).
Only then is the process group made, whose first collective is one of all ranks. Store and door take a connection from
anyone who reaches the node, as torch's and NCCL's own sockets do; with all processes on one node they listen on
127.0.0.1."""

import contextlib
import ipaddress
import os
import socket
import threading
import time
from concurrent.futures import Future, wait
from datetime import timedelta

import torch
from torch import distributed as dist

from ftlib.errors import FtError
from ftlib.train import probe, ranks
from ftlib.train.ranks import here

# Imports from a busy shared file system take minutes.
WAIT_S = float(os.environ.get("FT_RENDEZVOUS_S", "600"))
# Of one collective in training: rank 0 alone may be writing for long.
COLLECTIVE_S = 1800.0
# Ports tried one after the other, beginning with MASTER_PORT: another program may have taken some.
PORTS = 8
# To make the process group and sum over all ranks once: NCCL's set-up opens a connection for each pair of GPUs.
GROUP_S = 300.0


def connect(*, on_gpu: bool, name: str, always: bool = False, wait_s: float = WAIT_S) -> None:
    """Make the process group of this job. Collective; nothing to do for one process, unless `always`.
    name: of this run and life, so that another job's port is not taken for ours. FtError names a rank that did not come
    within `wait_s`, or a node that is cut off; the log names a slow node."""
    if ranks.world_size() == 1:
        if not always:
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | meeting)
    deadline = time.monotonic() + wait_s
    if ranks.rank() == 0:
        store, address = _serve(name), os.environ["MASTER_ADDR"]
    else:
        store, address = _find(name, deadline, wait_s)
    ranks.store = store
    if not _is_loopback(address):  # other nodes are there, too
        variable = "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
        address = probe.listen_address(address, variable=variable)
    store.set(f"here/{ranks.rank()}", probe.entry(here(), address))
    _roll_call(store, deadline, wait_s)
    probe.every_pair(store, name)
    _make_group(store, on_gpu=on_gpu)


def node_of(rank: int) -> str:
    """' (node NAME)' of a rank that has said nothing yet, by Slurm's list; empty without one."""
    try:
        from submitit import JobEnvironment

        nodes, each = JobEnvironment().hostnames, int(os.environ["SLURM_NTASKS_PER_NODE"])
        return f" (node {nodes[rank // each]})"
    except (RuntimeError, KeyError, ValueError, IndexError):
        return ""


def _serve(name: str) -> dist.TCPStore:
    """The store, and a door that tells its port to who asks: a store's client would wait for a stranger for ever.
    Both listen where MASTER_ADDR is: on 127.0.0.1 alone, or on all interfaces, since other nodes may know this one by
    another of its addresses than it does itself."""
    place = "127.0.0.1" if _is_loopback(os.environ["MASTER_ADDR"]) else "0.0.0.0"
    listener = socket.create_server((place, 0), backlog=2048)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        place, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=COLLECTIVE_S))
    first, taken = int(os.environ["MASTER_PORT"]), []
    for port in range(first, first + PORTS):
        try:
            door = socket.create_server((place, port))
        except OSError:
            taken.append(str(port))
            continue
        if taken:
            print(f"port {', '.join(taken)} in use on {here()}: the processes meet at {port}", flush=True)
        threading.Thread(target=_answer, args=(door, f"{name}\n{store.port}\n".encode()), daemon=True).start()
        return store
    raise FtError(f"ports {first} to {first + PORTS - 1} are in use on {here()}: the processes cannot meet")


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _answer(door: socket.socket, words: bytes) -> None:
    while True:
        asking, _ = door.accept()
        with asking, contextlib.suppress(OSError):
            asking.sendall(words)


def _find(name: str, deadline: float, wait_s: float) -> tuple[dist.TCPStore, str]:
    """Rank 0's store, and the address of this node from which it was reached."""
    address, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while time.monotonic() < deadline:
        for port in range(first, first + PORTS):
            with contextlib.suppress(OSError):  # Nobody there yet, or a stranger.
                with socket.create_connection((address, port), timeout=5) as door, door.makefile("rb") as said:
                    words = said.read(4096).decode(errors="replace").splitlines()
                    own_address = str(door.getsockname()[0])
                if len(words) == 2 and words[0] == name and words[1].isdigit():
                    store = dist.TCPStore(address, int(words[1]), timeout=timedelta(seconds=COLLECTIVE_S))
                    return store, own_address
        time.sleep(0.2)
    raise FtError(
        f"rank 0 on {address} did not open port {first} to {first + PORTS - 1} within {wait_s:.0f} s; "
        f"rank {ranks.rank()} on {here()} waited for it")


def _roll_call(store: dist.TCPStore, deadline: float, wait_s: float) -> None:
    """All ranks are here, or all that are leave with the names of those that are not."""
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
    if words := store.get("all here")[: probe.ENTRY_BYTES].decode(errors="replace"):
        raise FtError(words)


def _make_group(store: dist.TCPStore, *, on_gpu: bool) -> None:
    """The process group, and a sum over all ranks as its first collective: a subset must not come first with NCCL.
    FtError when that takes longer than GROUP_S. NCCL's own set-up waits without an end, so it is done in a thread
    that can be left behind; the process ends then (jobs/stage.py), and the thread with it."""
    backend = "nccl" if on_gpu else "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
    done: Future[float] = Future()

    def make() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # of this thread
            dist.init_process_group(
                backend, store=store, rank=ranks.rank(), world_size=ranks.world_size(), device_id=device,
                timeout=timedelta(seconds=COLLECTIVE_S))
            one = torch.ones(1, device=ranks.device())
            if ranks.world_size() > 1:
                dist.all_reduce(one)
            done.set_result(float(one))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    wait([done], timeout=GROUP_S)
    where = f"(rank {ranks.rank()} on {here()}). NCCL_DEBUG=INFO in the partition's 'environment' tells more"
    failed = f"the processes are here, but cannot talk: {backend} over all ranks"
    if not done.done():
        raise FtError(f"{failed} was not ready within {GROUP_S:.0f} s {where}")
    if isinstance(error := done.exception(), RuntimeError):
        first_line = str(error).partition("\n")[0]
        raise FtError(f"{failed} failed: {first_line} {where}") from error
    if (found := done.result()) != ranks.world_size():
        raise FtError(f"{failed} summed {ranks.world_size()} ones to {found:g} {where}")
