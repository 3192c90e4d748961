"""The comment of a Slurm job, by which a submit that was killed finds it again: `ftlib RUN STAGES NONCE`.

RUN is the name of the run or sweep, STAGES the stages that share the job joined by "+" ("guard" of the recovery job),
NONCE the word of the intent that was recorded before sbatch was called. Jobs that no run has to itself (the sweep
controller, the installation of packages, the build of an image) have a comment of three words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ftlib.runs.ledger import RECOVERY

AND = "+"
# What a comment calls the recovery job.
GUARD = "guard"


class Comment(NamedTuple):
    """What a job's comment says."""

    run: str
    stages: tuple[str, ...]
    nonce: str


def write(run: str, stages: Sequence[str], nonce: str) -> str:
    """The comment of the job that runs `stages`."""
    return f"ftlib {run} {AND.join(GUARD if stage == RECOVERY else stage for stage in stages)} {nonce}"


def shared(what: str, whose: str) -> str:
    """The comment of a job that no run has to itself."""
    return f"ftlib {what} {whose}"


def ends_with(text: str, nonce: str) -> bool:
    """Whether the comment is that of the intent with this nonce."""
    return text.endswith(f" {nonce}")


def parse(text: str) -> Comment | None:
    """What a comment says; None where the job is not one of ours."""
    words = text.split(" ")
    if len(words) != 4 or words[0] != "ftlib":
        return None
    stages = tuple(RECOVERY if stage == GUARD else stage for stage in words[2].split(AND))
    return Comment(words[1], stages, words[3])
