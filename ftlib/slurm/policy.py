"""What is done about an interrupted or failed life: requeue, requeue elsewhere, with less, or stop. Pure.

Preemption and time limits cost nothing while the run makes progress; every other cause has a budget of its own, and
three lives in a row that ended by the run's own doing without a newly committed step stop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftlib.slurm.diagnose import PLAIN, Cause

# Lives that may end for this cause since the run was last submitted by a person; None: no limit while it progresses.
BUDGET: dict[Cause, int | None] = {
    "preemption": None,
    "time limit": None,
    "by hand": None,
    "idle GPU": 0,
    "node failure": 10,
    "host memory": 2,
    "GPU memory": 6,
    "bad GPU": 4,
    "collective": 5,
    "disk full": 0,
    "input": 0,
    "code": 0,
    "container": 1,
    "transient": 5,
    "killed": 10,
    "cancelled": 0,
}
# Not the run's own doing: these lives may end without a new step as often as the site likes, up to SILENT_MOST.
FOREIGN: frozenset[Cause] = frozenset({"preemption", "time limit", "by hand", "node failure"})
MOST_WITHOUT_PROGRESS = 3
SILENT_MOST = 10
BACKOFF_S = {"transient": 30, "collective": 15}
MOST_BACKOFF_S = 600
MEMORY_GROWTH = 1.5

MEND: dict[Cause, str] = {
    "idle GPU": "see why it waits (make logs RUN={run}), then make resume RUN={run}",
    "host memory": 'ask for more: make submit … SET="resources.mem_gib=…", or a smaller data.limit',
    "GPU memory": 'a shorter data.seq_len, or a GPU with more memory: SET="cluster.gpu_partition=…"',
    "bad GPU": 'tell the site; keep away from the nodes: SET="cluster.exclude=…", then make resume RUN={run}',
    "disk full": "make room (checkpoints and logs are under runs/), then make resume RUN={run}",
    "input": "mend what the message names, then make resume RUN={run}, or submit again if the recipe changes",
    "code": "the traceback: make logs RUN={run}; after the mend submit with NEW=1, for the code is another",
    "container": "what Apptainer says (make logs RUN={run}): without user namespaces ask the site, or take the virtual "
    'environment: make submit … SET="cluster.container=null"',
    "collective": "look at the network settings of the profile (NCCL_*), then make resume RUN={run}",
    "transient": "when the storage or network is well again: make resume RUN={run}",
    "killed": "see the log's end (make logs RUN={run}), then make resume RUN={run}",
    "node failure": "make resume RUN={run}",
    "cancelled": "nothing; make resume RUN={run} would go on",
    "preemption": "nothing; it goes on by itself",
    "time limit": "nothing; it goes on by itself",
    "by hand": "nothing; it goes on by itself",
}


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
    """What to do after the last of `lives` (oldest first, since a person last submitted the stage).

    micro_batch: the present one; None where the stage does not train.
    """
    cause = lives[-1].cause
    plain = PLAIN[cause]
    same = [life for life in lives if life.cause == cause]
    budget = BUDGET[cause]
    if budget is not None and len(same) > budget:
        often = f" (for the {len(same)}. time)" if len(same) > 1 else ""
        return Decision(False, f"{plain}{often}; it would not help to try again")
    barren = 0
    for life in reversed(lives):
        if life.progressed:
            break
        barren += 1
    own = sum(life.cause not in FOREIGN for life in lives[len(lives) - barren :])
    if own >= MOST_WITHOUT_PROGRESS:
        return Decision(False, f"{plain}; {own} lives in a row ended by the run's own doing without a new step")
    if barren >= SILENT_MOST:
        return Decision(False, f"{plain}; {barren} lives in a row ended before a new step could be saved")
    backoff = min(BACKOFF_S.get(cause, 0) * 2 ** (len(same) - 1), MOST_BACKOFF_S) if cause in BACKOFF_S else 0
    if cause == "GPU memory":
        if micro_batch is None or micro_batch <= 1:
            return Decision(False, f"{plain}, and the micro-batch cannot be smaller")
        words = f"{plain}; again with micro-batch {micro_batch // 2} and twice the accumulation (same global batch)"
        return Decision(True, words, halve_micro_batch=True)
    if cause == "host memory":
        return Decision(True, f"{plain}; again with {MEMORY_GROWTH:g} times as much", memory_factor=MEMORY_GROWTH)
    if cause == "bad GPU":
        return Decision(True, f"{plain}; again on another node", exclude_node=True)
    wait = f" in {backoff} s" if backoff else ""
    return Decision(True, f"{plain}; going on from the last checkpoint{wait}", backoff_s=backoff)
