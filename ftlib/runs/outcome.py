"""How an attempt ended by its own account: a file of one line that a shell can read, written after its commit.

The line is `CODE MESSAGE`: the exit code by which the epilogue acts (0 done, 64 input wrong, 75 run again, 76 run again
on another node, 1 failed), and an explanation for a person.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ftlib import atomic
from ftlib.errors import INPUT_WRONG, RUN_ELSEWHERE

# What a single rank may find, and what then decides for the whole job: wrong input, or a bad GPU in its node.
OF_ANY_RANK = (INPUT_WRONG, RUN_ELSEWHERE)


@dataclass(frozen=True)
class Outcome:
    """The end of one attempt."""

    stage: str
    attempt: int  # 0: the stage was done for this run by another one
    code: int
    message: str


def write(folder: Path, outcome: Outcome) -> None:
    """Commit the outcome of an attempt."""
    folder.mkdir(exist_ok=True)
    atomic.write_text(folder / f"{outcome.stage}-{outcome.attempt}", _line(outcome))


def create(folder: Path, outcome: Outcome) -> bool:
    """Commit the outcome of an attempt unless it has one; whether this one stands. For ranks other than 0."""
    folder.mkdir(exist_ok=True)
    return atomic.create_text(folder / f"{outcome.stage}-{outcome.attempt}", _line(outcome))


def settle(folder: Path, outcome: Outcome) -> Outcome:
    """Commit the outcome of an attempt, for rank 0; returns the one that stands. That is an earlier one in which
    another rank says that the input is wrong, or its GPU: what rank 0 sees later (a lost connection, srun's SIGTERM)
    follows from it, and would be tried again on the same nodes."""
    if create(folder, outcome):
        return outcome
    for standing in read(folder, outcome.stage):
        if standing.attempt == outcome.attempt and standing.code in OF_ANY_RANK:
            return standing
    write(folder, outcome)
    return outcome


def _line(outcome: Outcome) -> str:
    return f"{outcome.code} {' '.join(outcome.message.split())}\n"


def read(folder: Path | str, stage: str | None = None) -> list[Outcome]:
    """Outcomes of a stage's attempts (of every stage's without one), first attempt first."""
    outcomes = []
    for name in _names(folder):
        stage_of_file, _, attempt = name.rpartition("-")
        if attempt.isdigit() and stage in (None, stage_of_file) and name[0] != ".":
            path = f"{folder}/{name}"
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: {error}") from None
            code, _, message = text.strip().partition(" ")
            if code.isdigit():
                outcomes.append(Outcome(stage_of_file, int(attempt), int(code), message))
    return sorted(outcomes, key=lambda outcome: outcome.attempt)


def done(folder: Path, stage: str) -> bool:
    """Whether some attempt of the stage ended with 0."""
    return any(outcome.code == 0 for outcome in read(folder, stage))


def _names(folder: Path | str) -> list[str]:
    """Names of the files in a folder; none where it does not exist (a copy may leave out what is empty)."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
