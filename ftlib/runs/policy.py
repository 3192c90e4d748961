"""What is done about an interrupted or failed life: requeue, requeue elsewhere, with less, or stop. Pure.

Preemption and time limits cost nothing while the run makes progress; every other cause has a budget of its own, and
three lives in a row that ended by the run's own doing without a newly committed step stop it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ftlib.runs.diagnosis import Cause

MOST_WITHOUT_PROGRESS = 3
SILENT_MOST = 10
MOST_BACKOFF_S = 600
MEMORY_GROWTH = 1.5


@dataclass(frozen=True)
class Kind:
    """A cause in plain words, and what is done about it."""

    plain: str
    mend: str  # what a person does where it has stopped the run
    budget: int | None = None  # lives that may end so since a person last submitted; None: any, while it progresses
    foreign: bool = False  # not the run's own doing: so many barren lives stop it only after SILENT_MOST
    backoff_s: int = 0  # before the first new try, doubled for each more


_AGAIN = "make resume RUN={run}"
_SAVE = f"no attempt lasted until its first save: request more time, or a QOS that is not preempted, then {_AGAIN}"
KINDS: dict[Cause, Kind] = {
    "preemption": Kind("another job with a higher claim took the node", _SAVE, foreign=True),
    "time limit": Kind("the job's time limit came near", _SAVE, foreign=True),
    "by hand": Kind("someone requeued it, or sent it the signal to save and start again", _AGAIN, foreign=True),
    "idle GPU": Kind(
        "the GPU did nothing for longer than the site allows",
        f"see why it waits (make logs RUN={{run}}), then {_AGAIN}", 0,
    ),
    "node failure": Kind("the node failed", _AGAIN, 10, foreign=True),
    "host memory": Kind(
        "the requested host memory ran out",
        'a smaller data.limit, or nodes with more memory: SET="cluster.gpu_partition=…" (cpu_partition)', 2,
    ),
    "GPU memory": Kind(
        "the GPU's memory ran out",
        'a shorter data.seq_len, or a GPU with more memory: SET="cluster.gpu_partition=…"', 6,
    ),
    "bad GPU": Kind(
        "a GPU of this node is faulty",
        f'tell the site; avoid the nodes: SET="cluster.exclude=…", then {_AGAIN}', 4,
    ),
    "collective": Kind(
        "the processes lost contact with each other",
        f"look at the network settings of the profile (NCCL_*), then {_AGAIN}", 5, backoff_s=15,
    ),
    "disk full": Kind(
        "the disk or the quota is full", f"make room (checkpoints and logs are under runs/), then {_AGAIN}", 0
    ),
    "input": Kind(
        "the input is wrong", f"fix what the message names, then {_AGAIN}, or submit again if the recipe changes", 0
    ),
    "code": Kind(
        "the program failed, and would again",
        "see the traceback (make logs RUN={run}); once it is fixed submit with NEW=1, because the code has changed", 0,
    ),
    "container": Kind(
        "Apptainer could not start the image",
        "see what Apptainer says (make logs RUN={run}): without user namespaces ask the site, or use the virtual "
        'environment: make submit … SET="cluster.container=null"', 1,
    ),
    "transient": Kind(
        "the file system or network failed for a moment",
        f"when the storage or network works again: {_AGAIN}", 5, backoff_s=30,
    ),
    "killed": Kind(
        "the process was killed, and nothing tells by whom",
        f"see the end of the log (make logs RUN={{run}}), then {_AGAIN}", 10,
    ),
    "cancelled": Kind("it was cancelled", f"nothing; {_AGAIN} continues it", 0),
    "unknown": Kind(
        "nothing tells why it ended",
        f"see the end of the log (make logs RUN={{run}}), ask the site about the job and its nodes, then {_AGAIN}", 10,
        foreign=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Life:
    """How one earlier or the present life of a stage ended."""

    cause: Cause
    progressed: bool  # a checkpoint of a new step was committed in it


@dataclass(frozen=True)
class Decision:
    """What to do now."""

    requeue: bool
    words: str
    backoff_s: int = 0
    exclude_node: bool = False
    halve_micro_batch: bool = False
    memory_factor: float = 1.0


def decide(lives: Sequence[Life], *, micro_batch: int | None) -> Decision:
    """What to do after the last of `lives` (oldest first, since a person submitted). `micro_batch`: where it trains."""
    cause = lives[-1].cause
    kind, same = KINDS[cause], sum(life.cause == cause for life in lives)
    plain = kind.plain
    if cause == "cancelled":
        return Decision(False, f"{plain} and will not be restarted")
    if kind.budget is not None and same > kind.budget:
        often = f" (for the {same}. time)" if same > 1 else ""
        return Decision(False, f"{plain}{often}; trying again would not help")
    barren = list(itertools.takewhile(lambda life: not life.progressed, reversed(lives)))
    own = sum(not KINDS[life.cause].foreign for life in barren)
    if own >= MOST_WITHOUT_PROGRESS:
        return Decision(False, f"{plain}; {own} attempts in a row failed without making progress")
    if len(barren) >= SILENT_MOST:
        return Decision(False, f"{plain}; {len(barren)} attempts in a row ended before anything new could be saved")
    if cause == "GPU memory":
        if micro_batch is None or micro_batch <= 1:
            return Decision(False, f"{plain}, and the micro-batch cannot be smaller")
        words = f"{plain}; again with micro-batch {micro_batch // 2} and twice the accumulation (same global batch)"
        return Decision(True, words, halve_micro_batch=True)
    if cause == "host memory":
        words = f"{plain}; again with {MEMORY_GROWTH:g} times as much memory"
        return Decision(True, words, memory_factor=MEMORY_GROWTH)
    if cause == "bad GPU":
        return Decision(True, f"{plain}; again on another node", exclude_node=True)
    backoff = min(kind.backoff_s * 2 ** (same - 1), MOST_BACKOFF_S)
    wait = f" in {backoff} s" if backoff else ""
    return Decision(True, f"{plain}; resuming from the last checkpoint{wait}", backoff_s=backoff)
