"""Many random histories on all cores: how far it came is kept in a small file, so that it goes on from there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulate import driver
from ftlib import atomic

CHECKOUT = Path(__file__).parents[2]
# What is simulated, and what simulates: after a change all histories count as not run.
SOURCES = ("ftlib/runs", "ftlib/slurm/evidence.py", "benchmarks/simulate")
# Histories that one worker runs before it reports.
CHUNK = 50
# Seconds between two writes of the state, and between two progress lines where nobody watches a terminal.
SAVE_S, REPORT_S = 5.0, 30.0
# Failures of which the end prints the shrunk trace: one of each kind, and no more kinds than this.
MOST_SHOWN = 5
# The first seed, and how many histories.
Chunk = tuple[int, int]
# How they ended -> how many; seed -> its violations.
ChunkResult = tuple[Chunk, dict[str, int], dict[int, list[str]]]


@dataclass
class State:
    """What has run."""

    code: str  # digest of SOURCES
    done: set[int] = field(default_factory=set)  # first seeds of chunks
    ends: Counter[str] = field(default_factory=Counter)  # how histories ended -> how many
    failures: dict[int, list[str]] = field(default_factory=dict)  # seed -> violations

    @classmethod
    def read(cls, file: Path) -> State:
        """The state in `file`; a new one where there is none, or of other code."""
        code = _digest()
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            if row["code"] == code:
                failures = {int(seed): found for seed, found in row["failures"].items()}
                return cls(code, set(row["done"]), Counter(row["ends"]), failures)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls(code)

    def write(self, file: Path) -> None:
        """Put it into `file`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"code": self.code, "done": sorted(self.done), "ends": self.ends, "failures": self.failures}
        atomic.write_text(file, json.dumps(row))


def run(*, histories: int, first: int, workers: int, state_file: Path) -> int:
    """Run the histories of the seeds from `first` on that the state does not have yet; 1 where one fails, else 0."""
    state = State.read(state_file)
    chunks = [(seed, min(CHUNK, first + histories - seed)) for seed in range(first, first + histories, CHUNK)]
    missing = [chunk for chunk in chunks if chunk[0] not in state.done]
    before = histories - sum(count for _, count in missing)
    if before:
        print(f"{before:,} of {histories:,} histories ran before; going on from there", flush=True)
    progress = _Progress(histories, before)
    saved = time.monotonic()
    try:
        for chunk, ends, failures in _results(missing, workers):
            state.done.add(chunk[0])
            state.ends.update(ends)
            state.failures.update(failures)
            progress.add(chunk[1], len(state.failures))
            if time.monotonic() - saved > SAVE_S:
                saved = time.monotonic()
                state.write(state_file)
    except KeyboardInterrupt:
        state.write(state_file)
        print("\nstopped: run it again to continue", flush=True)
        return 130
    progress.end()
    state_file.unlink(missing_ok=True)
    print(f"{histories:,} histories: {', '.join(f'{count:,} {end}' for end, count in state.ends.most_common())}")
    return _report(state.failures)


def kind_of(violation: str) -> str:
    """A violation without its numbers, by which failures of one cause are counted together."""
    return re.sub(r"\d+(_\d)?", "N", violation)[:110]


def run_chunk(chunk: Chunk) -> ChunkResult:
    """Run so many histories from a seed on."""
    first, count = chunk
    ends: Counter[str] = Counter()
    failures = {}
    for seed in range(first, first + count):
        result = driver.run(driver.history_of(seed))
        ends[result.end] += 1
        if result.violations:
            failures[seed] = [str(violation) for violation in result.violations]
    return chunk, dict(ends), failures


def _results(chunks: Iterable[Chunk], workers: int) -> Iterator[ChunkResult]:
    if workers == 1:
        yield from map(run_chunk, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(run_chunk, chunks)


def _report(failures: dict[int, list[str]]) -> int:
    """Print what failed, one history of each kind with its trace."""
    if not failures:
        print("no invariant was violated")
        return 0
    kinds: dict[str, list[int]] = {}
    for seed in sorted(failures):
        kinds.setdefault(kind_of(failures[seed][0]), []).append(seed)
    for kind, seeds in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):6,}  {kind}   seeds {', '.join(map(str, seeds[:5]))}")
    for kind, seeds in list(kinds.items())[:MOST_SHOWN]:
        print(f"\n== {kind}: seed {seeds[0]}, with as few injections as still fail")
        result = driver.shrink(driver.run(driver.history_of(seeds[0])))
        print(describe(result))
    return 1


def describe(result: driver.Result) -> str:
    """A history in full: its site, what was injected, its trace, and what was violated."""
    lines = [str(result.history.scenario), *(f"   {injection}" for injection in result.history.injections)]
    lines += [*result.trace, result.end, *(f"  {violation}" for violation in result.violations)]
    return "\n".join(lines)


def _digest() -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        path = CHECKOUT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _Progress:
    """One line that says how far it is."""

    def __init__(self, histories: int, before: int) -> None:
        self._histories: int = histories
        self._before: int = before
        self._ran: int = 0
        self._began: float = time.monotonic()
        self._shown: float = 0.0

    def add(self, count: int, failures: int) -> None:
        self._ran += count
        now = time.monotonic()
        if now - self._shown < (1.0 if sys.stderr.isatty() else REPORT_S):
            return
        self._shown = now
        rate = self._ran / (now - self._began)
        left = self._histories - self._before - self._ran
        line = (
            f"{self._before + self._ran:,} of {self._histories:,} histories, {rate:.0f}/s, {left / rate / 60:.0f} min "
            f"left, {failures} failed"
        )
        print(line, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)

    def end(self) -> None:
        took = time.monotonic() - self._began
        print(f"{self._ran:,} histories in {took:.0f} s, {self._ran / max(took, 0.001):.0f}/s", flush=True)
