"""Whether every pair of nodes can talk, tried over plain TCP before NCCL is asked: the set-up of its communicators
obeys no timeout (pytorch#124950), and a subset of the ranks must not make the first call on them.

Anyone who reaches a node can connect here. What arrives is counted and thrown away; nothing of it is interpreted."""

import contextlib
import itertools
import json
import os
import socket
import socketserver
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import psutil
from torch import distributed as dist

from ftlib.errors import FtError, InputError
from ftlib.train import ranks

# Sent both ways by each pair, several times: the first also opens TCP's window, and the fastest counts.
PROBE_BYTES = 8 << 20
EXCHANGES = 3
# For a connection, and for each wait on it.
EXCHANGE_S = 20.0
# For all pairs together.
PAIRS_S = 180.0
# A node is slow that takes so many times the median of all nodes.
SLOW = 3.0
# Most that is read of another rank's entry in the store.
ENTRY_BYTES = 4096

Pairs = dict[tuple[str, str], float | None]


def entry(node: str, address: str) -> str:
    """What a rank writes into the store about itself; `read_entry` reads it."""
    return json.dumps({"node": node, "address": address})


def read_entry(found: bytes) -> tuple[str, str]:
    """(node, address) of a rank's entry; FtError where it is not one: the store is open to the network."""
    try:
        if len(found) > ENTRY_BYTES:
            raise ValueError
        values = json.loads(found)
        return str(values["node"]), str(values["address"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FtError(f"a rank's entry in the store is not readable: {found[:80]!r}") from None


def listen_address(reached_from: str, *, variable: str, environment: Mapping[str, str] = os.environ) -> str:
    """The address of this node at which others are to reach it: of the interface that `variable` (NCCL_SOCKET_IFNAME or
    GLOO_SOCKET_IFNAME) names, else `reached_from`, from which rank 0 was reached. InputError: no such interface."""
    wanted = environment.get(variable, "")
    if not wanted or wanted.startswith("^"):  # ^ lists interfaces to leave out
        return reached_from
    exact, names = wanted.startswith("="), wanted.lstrip("=").split(",")
    there = {
        interface: address.address
        for interface, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET}
    for interface, address in there.items():
        if any(interface == name if exact else interface.startswith(name) for name in names if name):
            return address
    raise InputError(
        f"{variable}={wanted}: node {ranks.here()} has no such interface with an IPv4 address. Allowed: "
        f"{', '.join(sorted(there))}. It is set in the profile ('environment' of a partition)")


def every_pair(store: dist.Store, name: str) -> None:
    """Each node's first rank exchanges a block with every other's. Collective, without a process group.
    FtError on all ranks names the pairs of nodes that cannot talk; the log names a slow node."""
    nodes: dict[str, int] = {}
    addresses: dict[str, str] = {}
    for rank in range(ranks.world_size()):
        node, address = read_entry(store.get(f"here/{rank}"))
        if node not in nodes:
            nodes[node], addresses[node] = rank, address
    names, leaders = list(nodes), list(nodes.values())
    if len(names) == 1:
        return
    deadline = time.monotonic() + PAIRS_S
    hello = f"{name}\n".encode()
    with contextlib.ExitStack() as stack:
        if ranks.rank() in leaders:
            place = leaders.index(ranks.rank())
            if place:
                stack.callback(_listen(store, place, addresses[names[place]], hello))
            _exchange_with_later(store, place, [addresses[node] for node in names], hello, deadline)
        if ranks.rank() == 0:
            pairs = _collect(store, names, deadline)
            cut = [f"{a} and {b}" for (a, b), seconds in pairs.items() if seconds is None]
            store.set("pairs", "; ".join(cut))
            if slow := slow_words(pairs):
                print(slow, flush=True)
        store.wait(["pairs"], timedelta(seconds=PAIRS_S + EXCHANGE_S))
        if named := store.get("pairs")[:ENTRY_BYTES].decode(errors="replace"):
            raise FtError(
                f"the processes are here, but cannot talk: {named} did not come through "
                f"(rank {ranks.rank()} on {ranks.here()}). Is the profile's NCCL_SOCKET_IFNAME right? Is a node cut "
                f"off?")


def slow_words(pairs: Pairs) -> str:
    """Which nodes are slow with all others, from the seconds each pair's exchange took; empty without any."""
    best: dict[str, float] = {}
    for pair, seconds in pairs.items():
        for node in pair if seconds is not None else ():
            best[node] = min(best.get(node, seconds), seconds)
    if len(best) < 3:
        return ""  # Of two nobody knows which.
    middle = statistics.median(best.values())
    slow = [f"{node} ({taken / middle:.1f} times the median)" for node, taken in best.items() if taken > SLOW * middle]
    return f"slow nodes in the network: {', '.join(slow)}; cluster.exclude leaves a node out" if slow else ""


class _Echo(socketserver.ThreadingTCPServer):
    """Answers each block of a partner that says `hello` with a block."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: str, hello: bytes) -> None:
        self.hello = hello
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, 0), _Answer)

    def close(self) -> None:
        """Answer nobody any more."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: the partner reports what did not come through, and a stranger is of no interest."""


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        partner, hello = self.request, self.server.hello  # type: ignore[attr-defined]
        partner.settimeout(EXCHANGE_S)
        if _receive(partner, len(hello)) != hello:
            return
        for _ in range(EXCHANGES):
            _receive(partner, PROBE_BYTES)
            partner.sendall(bytes(PROBE_BYTES))


def _listen(store: dist.Store, place: int, address: str, hello: bytes) -> Callable[[], None]:
    """Serve partners in a thread until what is returned is called; the port stands in the store, 0 where this node
    cannot be reached at the address: its pairs then do not come through, and it is named."""
    try:
        server = _Echo(address, hello)
    except OSError as error:
        print(f"rank {ranks.rank()} on {ranks.here()} cannot listen at {address}: {error}", flush=True)
        store.set(f"probe/{place}", "0")
        return lambda: None
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    store.set(f"probe/{place}", str(server.server_address[1]))
    return server.close


def _exchange_with_later(store: dist.Store, place: int, addresses: list[str], hello: bytes, deadline: float) -> None:
    """Exchange with all later places, in an order in which no two pairs of a turn share a node."""
    for turn in range(1, 1 << (len(addresses) - 1).bit_length()):
        if place < (other := place ^ turn) < len(addresses):
            seconds = None
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                store.wait([f"probe/{other}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
                seconds = _fastest(addresses[other], int(store.get(f"probe/{other}")[:8]), hello)
            store.set(f"pair/{place}/{other}", json.dumps(seconds))


def _fastest(address: str, port: int, hello: bytes) -> float:
    """Seconds of the fastest exchange of a block both ways; OSError where one does not come through."""
    taken = []
    with socket.create_connection((address, port), timeout=EXCHANGE_S) as partner:
        partner.sendall(hello)
        for _ in range(EXCHANGES):
            began = time.monotonic()
            partner.sendall(bytes(PROBE_BYTES))
            _receive(partner, PROBE_BYTES)
            taken.append(time.monotonic() - began)
    return min(taken)


def _receive(partner: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; ConnectionError when fewer come."""
    found = bytearray(size)
    view = memoryview(found)
    while view:
        count = partner.recv_into(view)
        if not count:
            raise ConnectionError("the other side hung up")
        view = view[count:]
    return bytes(found)


def _collect(store: dist.Store, names: list[str], deadline: float) -> Pairs:
    """What each pair of nodes reported by then: seconds, or None where nothing came through."""
    pairs: Pairs = {}
    for a, b in itertools.combinations(range(len(names)), 2):
        key, seconds = f"pair/{a}/{b}", None
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if store.check([key]):
            with contextlib.suppress(ValueError, TypeError):
                seconds = float(json.loads(store.get(key)[:64]))
        pairs[names[a], names[b]] = seconds
    return pairs
