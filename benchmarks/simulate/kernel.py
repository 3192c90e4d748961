"""Simulated time and simulated processes.

A process is a greenlet that runs real code. At each of its operations (a file read or written, a command called, a
sleep) it hands over to the kernel, which lets another process continue or ends this one: a killed process is never
continued, so that none of its `finally` blocks acts.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

# The histories begin at this moment, in seconds since 1970.
BEGIN = 1_800_000_000.0
# Operations of one history, beyond which it is taken for an endless one.
MOST_OPERATIONS = 60_000

Hook = Callable[["Process", str], None]


class Endless(Exception):
    """A history does not come to rest."""


class Process:
    """One process on one machine."""

    def __init__(self, kernel: Kernel, name: str, role: str, machine: str, body: Callable[[], Any]) -> None:
        self.kernel: Kernel = kernel
        self.name: str = name
        self.role: str = role  # "submit", "prologue", … : what triggers are counted by
        self.machine: str = machine
        self.alive: bool = True
        self.ended: float = 0.0
        self.failure: BaseException | None = None  # what ended it, if that was an exception
        self.result: Any = None
        self.signals: list[str] = []  # delivered and not handled yet
        self.random: random.Random = random.Random(f"{kernel.seed} {name}")
        self.job: Any = None  # the Slurm job that it is part of
        self.lost: bool = False  # it runs on a node that Slurm has given up
        self._body: Callable[[], Any] = body
        self._waiters: list[Process] = []
        self._wakeable: bool = False  # a signal ends the present wait
        self._token: int = 0  # of the wake-up that counts; earlier ones are void
        # Its end leads back to the kernel, whoever has started it.
        self._greenlet: Any = greenlet(self._main, parent=kernel.hub)

    def _main(self) -> None:
        try:
            self.result = self._body()
        except GreenletExit:
            return
        except Exception as error:
            self.failure = error
        self._ended()

    def _ended(self) -> None:
        self.alive = False
        self.ended = self.kernel.now
        for waiter in self._waiters:
            waiter.wake()
        self._waiters.clear()

    def wake(self) -> None:
        """End the process's present wait now."""
        if self.alive:
            self._token += 1
            self.kernel.push(0.0, self._continue, self._token)

    def signal(self, name: str) -> None:
        """Deliver a signal; a process that looks for signals notices it at once."""
        if self.alive:
            self.signals.append(name)
            if self._wakeable:
                self.wake()

    def kill(self) -> None:
        """End the process where it stands, as SIGKILL does."""
        if not self.alive:
            return
        self.kernel.trace(f"killed: {self.name}")
        self._ended()
        self._token += 1
        if self.kernel.current is self:
            self.kernel.abandon()

    def _continue(self, token: int) -> None:
        if self.alive and token == self._token:
            self.kernel.enter(self)

    def switch(self) -> None:
        """Run the process until its next operation. Only the kernel calls it."""
        self._greenlet.switch()

    def throw_away(self) -> None:
        """Free the greenlet of a process that was killed or never ended."""
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)


class Kernel:
    """Time, the processes, and what happens at which moment."""

    def __init__(self, seed: str, *, tracing: bool = False) -> None:
        self.seed: str = seed
        self.now: float = BEGIN
        self.current: Process | None = None
        self.processes: list[Process] = []
        self.operations: int = 0
        self.lines: list[str] = []  # of the trace
        self.on_operation: Hook | None = None  # the driver's: may kill the process, or do anything else then
        self._counts: Counter[str] = Counter()  # name -> processes of that name
        self._tracing: bool = tracing
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._pushed: int = 0
        self.hub: Any = getcurrent()
        self._endless: bool = False
        self._closing: bool = False

    # -- what happens later ----------------------------------------------------------------------------------------

    def push(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        """Call `act(*arguments)` in so many seconds."""
        self._pushed += 1
        heapq.heappush(self._heap, (self.now + seconds, self._pushed, act, arguments))

    def run(self, until: float | None = None) -> None:
        """Let time pass until nothing more will happen, or until a moment (in seconds since 1970)."""
        while self._heap and (until is None or self._heap[0][0] <= until):
            self.now, _, act, arguments = heapq.heappop(self._heap)
            act(*arguments)
            if self._endless:
                raise Endless(f"more than {MOST_OPERATIONS} operations")
        if until is not None:
            self.now = max(self.now, until)

    def close(self) -> None:
        """Free all greenlets. What `finally` blocks of killed processes try to do has no effect."""
        self._closing = True
        for process in self.processes:
            process.throw_away()

    # -- processes -------------------------------------------------------------------------------------------------

    def spawn(
        self, name: str, role: str, machine: str, body: Callable[[], Any], *, job: Any = None, delay_s: float = 0.0
    ) -> Process:
        """Start a process."""
        self._counts[name] += 1
        process = Process(self, f"{name}#{self._counts[name]}", role, machine, body)
        process.job = job
        self.processes.append(process)
        process._token += 1
        self.push(delay_s, process._continue, process._token)
        return process

    def enter(self, process: Process) -> None:
        """Continue a process until its next operation."""
        self.current = process
        process.switch()
        self.current = None

    def abandon(self) -> None:
        """Leave the current process for good."""
        self.hub.switch()
        raise GreenletExit

    def pause(self, seconds: float, *, wakeable: bool = False) -> None:
        """Let the current process wait; with `wakeable` a signal ends the wait."""
        if self._closing:
            raise GreenletExit
        process = self.current
        assert process is not None, "no process runs"
        if wakeable and process.signals:
            return
        process._wakeable = wakeable
        process._token += 1
        self.push(seconds, process._continue, process._token)
        self.hub.switch()
        if self._closing:
            raise GreenletExit
        process._wakeable = False

    def wait_for(self, other: Process) -> None:
        """Let the current process wait until another one has ended."""
        while other.alive:
            process = self.current
            assert process is not None
            other._waiters.append(process)
            process._token += 1
            self.hub.switch()
            if self._closing:
                raise GreenletExit

    def operation(self, what: str, seconds: float) -> None:
        """The current process does something that others may see: it takes a while, and may be its last."""
        if self._closing:
            raise GreenletExit
        process = self.current
        assert process is not None, f"{what}: no process runs"
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            self._endless = True
            self.abandon()
        if self._tracing:
            self.trace(f"{process.name}: {what}")
        if self.on_operation is not None:
            self.on_operation(process, what)
        self.pause(seconds * (0.5 + process.random.random()))

    def trace(self, line: str) -> None:
        """Add a line to the history's trace."""
        if self._tracing:
            self.lines.append(f"{self.now - BEGIN:12.2f}  {line}")

    @property
    def me(self) -> Process:
        """The current process."""
        assert self.current is not None, "no process runs"
        return self.current
