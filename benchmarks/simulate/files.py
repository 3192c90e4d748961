"""The run folder in memory, with what a shared file system does to it.

One file for each writer of events, whose last line a kill can cut short; attempts that are created exclusively; outcome
files; checkpoints that appear whole; and a claim with an owner, which is taken over where that owner is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.simulate.kernel import Kernel, Process
from ftlib.errors import InputError
from ftlib.runs.attempts import Attempt
from ftlib.runs.events import Event
from ftlib.runs.ledger import Ledger
from ftlib.runs.outcome import Outcome

READ_S, WRITE_S = 0.02, 0.05
# How often a process that waits for a claim looks at it; the real one does so every second.
CLAIM_POLL_S = 10.0


@dataclass
class EventFile:
    """The file of one writer."""

    events: list[Event] = field(default_factory=list)
    torn: bool = False  # its last line is not whole: a line that is appended to it is lost, too
    latest: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint (of a stage without steps: so many pieces of its work)."""

    step: int
    attempt: int
    at: float


class RunFiles:
    """What lies in the run's folder."""

    def __init__(self, kernel: Kernel, *, name: str, micro_batch: int, rows_of_a_rank: int) -> None:
        self.kernel: Kernel = kernel
        self.name: str = name
        self.full: bool = False  # nothing can be written
        self.files: dict[str, EventFile] = {}
        self.attempts: dict[str, list[Attempt]] = {}
        self.outcomes: dict[tuple[str, int], Outcome] = {}
        self.checkpoints: dict[str, list[Checkpoint]] = {}
        self.claim: Process | None = None  # who may queue jobs of the run
        self.version: int = 0  # changes with every write
        self._plan: tuple[int, int] = (micro_batch, rows_of_a_rank)
        self._ledger: tuple[int, Ledger] | None = None

    def done(self, stage: str) -> bool:
        """Whether an attempt of the stage has ended well."""
        return any(outcome.code == 0 for (name, _), outcome in self.outcomes.items() if name == stage)

    def now_ledger(self) -> Ledger:
        """The ledger as it is at this moment."""
        if self._ledger is None or self._ledger[0] != self.version:
            self._ledger = self.version, self._read(self._outcomes(), self._events(), self._attempts())
        return self._ledger[1]

    def read(self) -> Ledger:
        """The ledger as the current process reads it: one folder after the other, while others write."""
        version = self.version
        outcomes = self._outcomes()
        self.kernel.operation("read events", READ_S)
        events = self._events() if self.version != version else None
        self.kernel.operation("read attempts", READ_S)
        if self.version == version:
            return self.now_ledger()
        return self._read(outcomes, events if events is not None else self._events(), self._attempts())

    def append(self, writer: str, events: Sequence[Event], clock: float) -> None:
        """Add events to a writer's file. Killed in between, it leaves those before and half of a line."""
        self.kernel.operation(f"write {', '.join(_short(event) for event in events)}", WRITE_S)
        self.check_space()
        file = self.files.setdefault(writer, EventFile())
        lost, file.torn = file.torn, True
        for event in events:
            self.version += 1
            if len(events) > 1 or self.kernel.me.random.random() < 0.2:
                self.kernel.operation("write on", WRITE_S)
            file.latest = max(file.latest, clock)
            if not lost:
                file.events.append(replace(event, time=file.latest, writer=writer))
            lost = False
        file.torn = False
        self.version += 1

    def begin_attempt(self, stage: str, number: int, job_id: str, node: str, began: float) -> bool:
        """Create an attempt's file; False where another has taken its number."""
        self.kernel.operation(f"begin attempt {number} of {stage}", WRITE_S)
        attempts = self.attempts.setdefault(stage, [])
        if len(attempts) >= number:
            return False
        self.check_space()
        attempts.append(Attempt(stage, number, job_id, node, int(began)))
        self.version += 1
        return True

    def end_attempt(self, outcome: Outcome) -> None:
        """Write an attempt's outcome; it appears whole."""
        self.kernel.operation(f"outcome {outcome.code} of {outcome.stage}-{outcome.attempt}", WRITE_S)
        self.check_space()
        self.outcomes[outcome.stage, outcome.attempt] = outcome
        self.version += 1

    def commit(self, stage: str, step: int, attempt: int) -> None:
        """Let a checkpoint appear."""
        self.kernel.operation(f"commit {stage} step {step} of attempt {attempt}", WRITE_S)
        self.check_space()
        self.checkpoints.setdefault(stage, []).append(Checkpoint(step, attempt, self.kernel.now))

    def newest_step(self, stage: str) -> int:
        """The step of the newest checkpoint; 0 without one."""
        self.kernel.operation(f"read checkpoints of {stage}", READ_S)
        return max((checkpoint.step for checkpoint in self.checkpoints.get(stage, ())), default=0)

    def check_space(self) -> None:
        if self.full:
            raise OSError(28, "No space left on device")

    def _read(
        self, outcomes: dict[str, tuple[Outcome, ...]], events: tuple[Event, ...],
        attempts: dict[str, tuple[Attempt, ...]],
    ) -> Ledger:  # fmt: skip
        return Ledger(events, attempts, outcomes, micro_batch=self._plan[0], rows_of_a_rank=self._plan[1])

    def _outcomes(self) -> dict[str, tuple[Outcome, ...]]:
        stages: dict[str, list[Outcome]] = {}
        for stage, number in sorted(self.outcomes):
            stages.setdefault(stage, []).append(self.outcomes[stage, number])
        return {stage: tuple(ends) for stage, ends in stages.items()}

    def _events(self) -> tuple[Event, ...]:
        found = [event for writer in sorted(self.files) for event in self.files[writer].events]
        return tuple(sorted(found, key=lambda event: event.time))

    def _attempts(self) -> dict[str, tuple[Attempt, ...]]:
        return {stage: tuple(attempts) for stage, attempts in self.attempts.items() if attempts}


class Store:
    """`ftlib.runs.store.RunStore` of one process."""

    def __init__(self, files: RunFiles, *, writer: str, skew_s: float) -> None:
        """skew_s: how far the clock of its machine is ahead."""
        self.files: RunFiles = files
        self.name: str = files.name
        self._writer: str = writer
        self._skew_s: float = skew_s

    def ledger(self) -> Ledger:
        return self.files.read()

    def clock(self) -> float:
        """Now by the machine's clock."""
        return self.files.kernel.now + self._skew_s

    def record(self, *events: Event, writer: str | None = None) -> None:
        self.files.append(writer or self._writer, events, self.clock())

    @contextlib.contextmanager
    def claim(self, *, wait_s: float = 0.0, silent_s: float | None = None) -> Iterator[None]:
        """As `ftlib.claim`: of several processes one has it; a stale one is taken over."""
        kernel, files = self.files.kernel, self.files
        deadline = kernel.now + wait_s
        kernel.operation("claim", WRITE_S)
        me = kernel.me
        while files.check_space() or not self._free(me, silent_s):
            if kernel.now > deadline:
                raise InputError(f"run {self.name}: another process is writing it")
            kernel.operation("wait for the claim", WRITE_S)
            kernel.pause(CLAIM_POLL_S)
        files.claim = me
        try:
            yield
        finally:
            kernel.operation("release the claim", WRITE_S)
            if files.claim is me:
                files.claim = None

    def _free(self, me: Process, silent_s: float | None) -> bool:
        """Whether the process may have the claim."""
        owner = self.files.claim
        if owner is None:
            return True
        if owner.alive:
            return False
        # Of a process on another machine only its silence is known.
        return owner.machine == me.machine or (silent_s is not None and self.files.kernel.now - owner.ended > silent_s)


def _short(event: Event) -> str:
    names = ("stage", "attempt", "job_id", "cause", "choice", "field", "value")
    fields = [f"{name}={value}" for name in names if (value := getattr(event, name, None))]
    return f"{type(event).__name__}({', '.join(fields)})"
