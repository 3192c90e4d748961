"""Why an attempt ended: one pure function over all the evidence there is, any part of which may be missing.

The rule: never a wrong cause. What Slurm says of the whole job stands above what the attempt says of itself, and that
above what its log complains of; nothing follows from a source's silence; where nothing tells, the cause is "unknown".
Standard library only: it runs on the batch host, outside any container. `ftlib/slurm/evidence.py` gathers the evidence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ftlib.runs import signatures
from ftlib.runs.signatures import CLOCKS_S, Cause, Finding

__all__ = [
    "ACCOUNTED", "CLOCKS_S", "Accounted", "Cause", "Controller", "Evidence", "Finding", "cause_of", "from_outcome",
]  # fmt: skip

# What Slurm's state of a job tells of its end. FAILED says no more than that the batch script failed.
ACCOUNTED: dict[str, Cause] = {
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "PREEMPTED": "preemption",
    "TIMEOUT": "time limit",
    "DEADLINE": "time limit",
    "OUT_OF_MEMORY": "host memory",
    "CANCELLED": "cancelled",
    "REQUEUED": "by hand",
}
# Slurm warns up to a minute before the lead that was requested (sbatch(1), --signal).
EARLY_S = 60
SIGKILL = 9
# Exit codes of an outcome, see ftlib/outcome.py.
INPUT_WRONG, SAVED, BAD_NODE = 64, 75, 76
# How our own errors say it; the libraries' words need not name the reason.
_NO_ROOM = re.compile(r"[Nn]o space left|quota exceeded|could not be written, with|free some space")


@dataclass(frozen=True, kw_only=True)
class Accounted:
    """What accounting (sacct) says of one attempt of a job."""

    state: str  # such as "RUNNING" or "CANCELLED by 1000"
    ended: float | None = None  # seconds since 1970; None while it runs
    shell_signal: int | None = None  # the signal that ended the batch shell, 0 for none; None where it does not say


@dataclass(frozen=True, kw_only=True)
class Controller:
    """What the controller (`scontrol show job`) says of the job now: of its present attempt, or the one to come."""

    state: str  # such as RUNNING; COMPLETING hides what the end was
    reason: str = ""  # such as TimeLimit
    started: float | None = None  # seconds since 1970; None where it has not started (again)
    ends: float | None = None  # when it ended, or will be ended at its time limit; seconds since 1970
    preempted: float | None = None  # when another job was given its place; None where none was
    restarts: int | None = None  # how often the job was requeued before
    shell_signal: int | None = None  # as in Accounted


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known of the end of one attempt. A source that has no answer is None or empty."""

    slurm: bool = True  # it ran in a Slurm job; else as a process of a local run
    epilogue: bool = False  # its epilogue asks, so its host and batch shell live; else a later process does
    exit_code: int | None = None  # srun's; None where no epilogue saw it
    outcome_code: int | None = None  # of the outcome that the attempt committed; None without one
    outcome_message: str = ""
    logs: Mapping[int, str] = field(default_factory=dict)  # rank -> the end of its log; a missing log is left out
    ranks: int | None = None  # processes of the step
    accounted: Accounted | None = None  # None: accounting is disabled, does not answer, or does not know the attempt
    controller: Controller | None = None  # None: it does not answer, or has forgotten the job
    restarts: int | None = None  # how often the job had been requeued before this attempt (SLURM_RESTART_COUNT)
    cancelled_at: float | None = None  # `make cancel` recorded the job's cancellation then; seconds since 1970
    warning_s: float | None = None  # the lead of the warning the job was submitted with (--signal=USR2@N), in seconds
    began: float | None = None  # seconds since 1970, by the node's clock
    ended: float | None = None  # for the epilogue: now
    planned_end: float | None = None  # when the time limit that was submitted is over; seconds since 1970

    @property
    def first_log(self) -> str:
        """Rank 0's log, with the words of srun, slurmstepd and the batch shell; empty where it is missing."""
        return self.logs.get(0, "")

    @property
    def of_attempt(self) -> Controller | None:
        """The controller's answer where it is about this attempt, and not about the job's next one."""
        known = self.controller
        if known is None or known.started is None:
            return None
        if self.restarts is not None and known.restarts is not None and self.restarts != known.restarts:
            return None
        return known if self.began is not None and known.started <= self.began + CLOCKS_S else None

    @property
    def preempted(self) -> bool:
        """Whether Slurm has given the attempt's place to another job."""
        return self.of_attempt is not None and self.of_attempt.preempted is not None


def from_outcome(code: int, message: str) -> Cause | None:
    """The cause an outcome states itself; None where it only says that something went wrong, or that it was told to
    stop."""
    if code == INPUT_WRONG:
        return "disk full" if _NO_ROOM.search(message) else "input"
    if code == BAD_NODE:
        return "bad GPU"
    if code == SAVED and "(idle GPU)" in message:
        return "idle GPU"
    return None


def cause_of(evidence: Evidence) -> Finding:
    """Why an attempt ended."""
    for rule in _RULES:
        if finding := rule(evidence):
            return finding
    return _unknown(evidence)


# -- what ends a whole job ---------------------------------------------------------------------------------------------


def _cancelled(evidence: Evidence) -> Finding | None:
    """By its owner or an administrator, with `make cancel` or scancel, also while its epilogue runs."""
    if over := signatures.OVER_MEMORY.search(evidence.first_log):
        return Finding("host memory", over[0].strip()[:300], "Slurm ended it for that", 0)
    line = evidence.outcome_message
    if (at := evidence.cancelled_at) is not None:
        # A cancellation after the end was of the job that waited to start again.
        before_the_end = evidence.ended is not None and at <= evidence.ended + CLOCKS_S
        if evidence.epilogue or before_the_end:
            return Finding("cancelled", line, "make cancel was recorded")
    for state, who in _states(evidence):
        if ACCOUNTED.get(state.split(" ")[0]) == "cancelled":
            return Finding("cancelled", line, f"{who} says {state}")
    notice = _notice(evidence)
    # A running job was not cancelled: the signal was sent to its batch shell alone.
    runs = evidence.of_attempt is not None and evidence.of_attempt.state == "RUNNING"
    return notice if notice and notice.cause == "cancelled" and not runs else None


def _stated(evidence: Evidence) -> Finding | None:
    """By the attempt's outcome, which names its cause."""
    if evidence.outcome_code is None:
        return None
    cause = from_outcome(evidence.outcome_code, evidence.outcome_message)
    if cause is None:
        return None
    # The rank that found it printed it, too.
    rank = next((rank for rank, text in evidence.logs.items() if evidence.outcome_message in text), None)
    return Finding(cause, evidence.outcome_message, "its outcome says so", rank)


def _by_slurm(evidence: Evidence) -> Finding | None:
    """Where Slurm itself ended the attempt, what its log complains of came of that."""
    for state, who in _states(evidence):
        cause = ACCOUNTED.get(state.split(" ")[0])
        if cause == "by hand" and not _requeued_by_others(evidence):
            continue
        if cause:
            notice = _notice(evidence)
            line = notice.line if notice and notice.cause == cause else evidence.outcome_message
            return Finding(cause, line, f"{who} says {state}")
    notice = _notice(evidence)
    return notice if notice and notice.cause != "cancelled" else None


def _notice(evidence: Evidence) -> Finding | None:
    return signatures.notice(evidence.first_log, since=evidence.began)


def _states(evidence: Evidence) -> list[tuple[str, str]]:
    """Slurm's states of this attempt and who says them, accounting first: it also knows how a requeued one ended."""
    states = [(evidence.accounted.state, "Slurm's accounting")] if evidence.accounted else []
    if known := evidence.of_attempt:
        # While the job's last processes are ended, the reason alone tells of its time limit.
        over = known.state == "COMPLETING" and known.reason == "TimeLimit"
        states.append(("TIMEOUT" if over else known.state, "Slurm"))
    return states


def _requeued_by_others(evidence: Evidence) -> bool:
    """Whether it is known that not our own epilogue has requeued the job, as it does where it cannot settle an end."""
    if evidence.epilogue:
        return True
    return 0 in evidence.logs and not signatures.requeued_by_epilogue(evidence.first_log)


def _step_lost(evidence: Evidence) -> Finding | None:
    """watch.sh has missed the step's slurmstepd, and ended the step."""
    return signatures.step_lost(evidence.first_log)


def _shell_killed(evidence: Evidence) -> Finding | None:
    """The batch shell was killed: no epilogue runs, and slurmd sends the step SIGTERM, on which it saves."""
    if evidence.epilogue:
        return None
    signals = [evidence.accounted.shell_signal if evidence.accounted and _failed(evidence.accounted.state) else None]
    if (known := evidence.of_attempt) and _failed(known.state):
        signals.append(known.shell_signal)
    line = signatures.shell_lost(evidence.first_log)
    if SIGKILL not in signals and not line:
        return None
    if evidence.outcome_code is None and (fault := signatures.of_ranks(evidence.logs, evidence.ranks)):
        return fault
    saved = "; the work was saved" if evidence.outcome_code == SAVED else ""
    return Finding("killed", line, f"the batch shell was killed, and nothing tells by whom{saved}")


def _failed(state: str) -> bool:
    return state.split(" ")[0] == "FAILED"


# -- the warnings ------------------------------------------------------------------------------------------------------

Warned = Literal["USR2", "TERM"]
_WARNED_BY_WORD: dict[str, Warned] = {"User defined signal 2": "USR2", "Terminated": "TERM"}


def _signalled(evidence: Evidence) -> Finding | None:
    """It was told to stop. The same signal has several senders, and Slurm knows which it was."""
    signal, line = _warning(evidence)
    if signal is None:
        return None
    if signal == "TERM" and (fault := _ended_by_srun(evidence)):
        # Only Slurm can overrule that: a rank that dies of the warning ends the others, too.
        return Finding("preemption", line, "Slurm has preempted the job") if evidence.preempted else fault
    if evidence.preempted:
        return Finding("preemption", line, "Slurm has preempted the job")
    cause = _sender_of_usr2(evidence) if signal == "USR2" else _sender_of_term(evidence)
    if cause is None:
        # What its ranks' logs complain of came of the signal, whoever sent it; an exit code alone is a hint.
        return _unknown(evidence) if evidence.outcome_code is not None or 0 in evidence.logs else None
    far = "its end was far, and Slurm has not taken it back" if evidence.slurm else "no Slurm could have sent it"
    near = {"time limit": "its end was near", "by hand": far}
    return Finding(cause, line, f"SIG{signal} came; {near[cause]}")


def _warning(evidence: Evidence) -> tuple[Warned | None, str]:
    """Which signal told the attempt to stop, and where that is seen; None where none is known to have come."""
    if evidence.outcome_code is not None:
        words: dict[str, Warned] = {"(time limit)": "USR2", "(preemption)": "TERM"}
        named = [signal for word, signal in words.items() if word in evidence.outcome_message]
        return (named[0] if named and evidence.outcome_code == SAVED else None), evidence.outcome_message
    # The warnings end a rank whose handlers do not stand yet.
    if ends := signatures.rank_ends(evidence.first_log):
        return _WARNED_BY_WORD.get(ends[0].how), ends[0].line
    if 0 not in evidence.logs and evidence.exit_code in (140, 143):
        return ("USR2" if evidence.exit_code == 140 else "TERM"), f"exit code {evidence.exit_code}"
    return None, ""


def _ended_by_srun(evidence: Evidence) -> Finding | None:
    """The fault of another rank, where it was srun that sent SIGTERM because of that rank's end."""
    ends = signatures.rank_ends(evidence.first_log)
    if not ends or ends[0].saved or ends[0].how in _WARNED_BY_WORD:
        return None
    fault = signatures.of_ranks(evidence.logs, evidence.ranks)
    return fault or Finding("unknown", ends[0].line, f"rank {ends[0].rank} ended, and nothing tells why")


def _sender_of_usr2(evidence: Evidence) -> Literal["time limit", "by hand"] | None:
    """Slurm sends it as the warning before the time limit; a person may send it at any time."""
    if not evidence.slurm:
        return "by hand"
    if evidence.warning_s is None or evidence.ended is None:
        return None
    lead_s = evidence.warning_s + EARLY_S + CLOCKS_S
    if (known := evidence.of_attempt) and known.ends is not None and known.state == "RUNNING":
        return "time limit" if known.ends - evidence.ended <= lead_s else "by hand"
    # The time limit may have been changed since: that it was far away is not certain.
    near = evidence.planned_end is not None and 0 <= evidence.planned_end - evidence.ended <= lead_s
    return "time limit" if near else None


def _sender_of_term(evidence: Evidence) -> Literal["time limit", "by hand"] | None:
    """Slurm sends it when it takes a job back; srun, watch.sh and a person may send it, too."""
    if not evidence.slurm:
        return "by hand"
    known = evidence.of_attempt
    if known is None or known.state != "RUNNING" or known.ends is None or evidence.ended is None:
        return None
    if known.ends <= evidence.ended + CLOCKS_S:
        return "time limit"
    # The log would show it if it was srun or the watch.
    return "by hand" if 0 in evidence.logs else None


# -- its own doing -----------------------------------------------------------------------------------------------------


def _by_logs(evidence: Evidence) -> Finding | None:
    """A fault that its ranks' logs show, or the outcome, which is rank 0's."""
    if evidence.outcome_code in (0, SAVED):
        return None
    logs = dict(evidence.logs)
    if evidence.outcome_message:
        logs[0] = f"{evidence.first_log}\n{evidence.outcome_message}"
    fault = signatures.of_ranks(logs, evidence.ranks)
    if fault and fault.cause == "killed" and evidence.preempted:
        return Finding("preemption", fault.line, "Slurm has preempted the job")
    return fault or signatures.srun_killed(evidence.first_log)


def _preempted(evidence: Evidence) -> Finding | None:
    """It did not stop within the grace of a preemption."""
    return Finding("preemption", "", "Slurm has preempted the job") if evidence.preempted else None


def _failed_itself(evidence: Evidence) -> Finding | None:
    """Rank 0's outcome names an error that is no known one: the program's own."""
    if evidence.outcome_code in (None, 0, SAVED):
        return None
    ends = signatures.rank_ends(evidence.first_log)
    own = ends[0].rank == 0 if ends else evidence.ranks in (None, 1)
    if not own or signatures.from_log(evidence.outcome_message):
        return None
    return Finding("code", evidence.outcome_message, "its outcome says so", 0)


def _killed_locally(evidence: Evidence) -> Finding | None:
    """Without Slurm nothing but a kill ends a process before it can write its outcome."""
    if evidence.slurm or evidence.outcome_code is not None:
        return None
    return Finding("killed", "", "it left no outcome")


_RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    _cancelled, _stated, _by_slurm, _step_lost, _shell_killed, _signalled, _by_logs, _preempted, _failed_itself,
    _killed_locally,
)  # fmt: skip


def _unknown(evidence: Evidence) -> Finding:
    """What is known all the same, for a person."""
    signal, line = _warning(evidence)
    if signal:
        return Finding("unknown", line, f"it was told to stop (SIG{signal}), and nothing tells by whom")
    logs = {**evidence.logs, 0: f"{evidence.first_log}\n{evidence.outcome_message}"}
    complaints = (found for text in logs.values() if (found := signatures.from_log(text)))
    if lost := next((found for found in complaints if found.cause == "collective"), None):
        gone = ", ".join(f"rank {rank}" for rank in signatures.missing_ranks(logs, evidence.ranks))
        return Finding("unknown", lost.line, f"nothing was heard of the end of {gone}: killed, or its node lost")
    if evidence.outcome_message:
        return Finding("unknown", evidence.outcome_message, "its outcome does not tell why")
    if evidence.exit_code is not None:
        return Finding("unknown", f"exit code {evidence.exit_code}", "neither its logs nor Slurm tell why")
    state = evidence.accounted.state if evidence.accounted else "nothing"
    return Finding("unknown", "", f"no epilogue saw its end, and Slurm says {state}")
