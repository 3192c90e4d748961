"""The two ends of an attempt, on the batch host: what the prologue and the epilogue of a job's script call.

    python -m ftlib.slurm.attempt begin RUN STAGE ATTEMPT JOB             before srun
        prints "begin", or "exit CODE" where the job must end instead
    python -m ftlib.slurm.attempt end RUN STAGE ATTEMPT CODE JOB LOG      after srun; CODE is its exit code
        prints "requeued" (Slurm ends the shell in a moment), or "exit CODE"

What people should read goes to standard error, which is the job's log. Standard library only: the host of a container
may have nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ftlib.runs import act, overrides
from ftlib.runs.decide import EXIT_CANCELLED, EXIT_INTERRUPTED, Action, Nothing, Requeue, Stop
from ftlib.runs.folder import RunFolder
from ftlib.runs.scheduler import Here
from ftlib.slurm.controller import SlurmController
from ftlib.slurm.investigate import investigator


def begin(run: RunFolder, here: Here) -> str:
    """Settle what no epilogue saw; what the shell does next."""
    action = act.begin_attempt(run, SlurmController(), here, investigator(run.path))
    if isinstance(action, Stop):
        _say(action.message)
        return f"exit {action.code}"
    if isinstance(action, Nothing) and action.superseded:
        _say(action.message)
        return f"exit {EXIT_INTERRUPTED}"
    return "begin"


def end(run: RunFolder, here: Here, *, code: int, log: Path) -> str:
    """Settle the attempt, decide, and do it; what the shell does next."""
    controller = SlurmController()
    investigate = investigator(run.path, code=code, logs=log.parent, job_id=here.job_id)
    action = act.end_attempt(run, controller, here, investigate)
    _say(action.message)
    if isinstance(action, Requeue):
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        how = act.requeue(
            controller, here.job_id, changes_of(run, action), report=_say,
            restarts=int(restarts) if restarts.isdigit() else None,
        )  # fmt: skip
        if how == act.REQUEUED:
            return "requeued"
        return f"exit {EXIT_CANCELLED if how == 'CANCELLED' else EXIT_INTERRUPTED}"
    if isinstance(action, Stop):
        return f"exit {action.code}"
    return f"exit {EXIT_INTERRUPTED}"


def changes_of(run: RunFolder, action: Action) -> dict[str, str]:
    """What the requeued job's next attempt is to have, in scontrol's terms."""
    now = overrides.fold(run.ledger().events, time.time())
    changes = {}
    if isinstance(action, Requeue) and action.backoff_s:
        changes["StartTime"] = f"now+{action.backoff_s}"
    if any(change.field.startswith(overrides.EXCLUDE) for change in action.changes):
        # Slurm sets the whole list: the owner's nodes and those of earlier attempts would be in it no more.
        profile = run.read_json("provenance.json").get("profile", {})
        changes["ExcNodeList"] = now.exclude_list(profile.get("exclude")) or ""
    if any(change.field.startswith(overrides.MEMORY) for change in action.changes):
        changes["MinMemoryNode"] = str(now.memory_mib[action.stage])
    return changes


def _say(message: str) -> None:
    print(f"ftlib: {message}", file=sys.stderr, flush=True)


def main(words: list[str]) -> None:
    """The command line that the shell calls."""
    what, run, stage, attempt = words[0], RunFolder(Path(words[1])), words[2], int(words[3])
    if what == "begin":
        print(begin(run, Here(job_id=words[4], stage=stage, attempt=attempt, ended=False)))
        return
    code, job, log = words[4:7]
    may_requeue = os.environ.get("FT_REQUEUE", "1") == "1"
    memory = os.environ.get("SLURM_MEM_PER_NODE", "")
    here = Here(
        job_id=job, stage=stage, attempt=attempt, ended=True, may_requeue=may_requeue,
        mem_mib=int(memory) if memory.isdigit() else None,
    )  # fmt: skip
    print(end(run, here, code=int(code), log=Path(log)))


if __name__ == "__main__":
    main(sys.argv[1:])
