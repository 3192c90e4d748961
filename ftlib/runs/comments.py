"""The comment of a Slurm job, by which a submit that was killed finds it again: `ftlib RUN STAGES NONCE`.

RUN is the name of the run or sweep, STAGES the stages that share the job joined by "+" ("guard" of the recovery job),
NONCE the word of the intent that was recorded before sbatch was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

AND = "+"


class Comment(NamedTuple):
    """What a job's comment says."""

    run: str
    stages: tuple[str, ...]
    nonce: str


def write(run: str, stages: Sequence[str], nonce: str) -> str:
    """The comment of the job that runs `stages`."""
    return f"ftlib {run} {AND.join(stages)} {nonce}"


def parse(text: str) -> Comment | None:
    """What a comment says; None where the job is not one of ours."""
    words = text.split(" ")
    if len(words) != 4 or words[0] != "ftlib":
        return None
    return Comment(words[1], tuple(words[2].split(AND)), words[3])
