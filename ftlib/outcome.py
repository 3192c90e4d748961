"""How one life of a stage ended: a file of one line that a shell can read, written after the life's commit.
The line is `CODE WORDS`: the exit code by which the epilogue acts (0 done, 64 input wrong, 75 run again, 76 run again
on another node, 1 failed), and a person's explanation."""

import os
from dataclasses import dataclass
from pathlib import Path

from ftlib import atomic
from ftlib.errors import INPUT_WRONG, RUN_ELSEWHERE

# What a single rank may find, and what then decides for the whole job: wrong input, or a bad GPU in its node.
OF_ANY_RANK = (INPUT_WRONG, RUN_ELSEWHERE)


@dataclass(frozen=True)
class Outcome:
    """One life's end."""

    stage: str
    life: int
    code: int
    words: str


def write(folder: Path, outcome: Outcome) -> None:
    """Commit the outcome of a life."""
    folder.mkdir(exist_ok=True)
    atomic.write_text(folder / f"{outcome.stage}-{outcome.life}", _line(outcome))


def create(folder: Path, outcome: Outcome) -> bool:
    """Commit the outcome of an attempt unless it has one; whether this one stands. For ranks other than 0."""
    folder.mkdir(exist_ok=True)
    return atomic.create_text(folder / f"{outcome.stage}-{outcome.life}", _line(outcome))


def settle(folder: Path, outcome: Outcome) -> Outcome:
    """Commit the outcome of an attempt, for rank 0; returns the one that stands. That is an earlier one in which
    another rank says that the input is wrong, or its GPU: what rank 0 sees later (a lost connection, srun's SIGTERM)
    follows from it, and would be tried again on the same nodes."""
    if create(folder, outcome):
        return outcome
    for standing in read(folder, outcome.stage):
        if standing.life == outcome.life and standing.code in OF_ANY_RANK:
            return standing
    write(folder, outcome)
    return outcome


def _line(outcome: Outcome) -> str:
    return f"{outcome.code} {' '.join(outcome.words.split())}\n"


def read(folder: Path, stage: str | None = None) -> list[Outcome]:
    """Outcomes of a stage's lives (of every stage's without one), first life first."""
    found = []
    for name in names(folder):
        of, _, life = name.rpartition("-")
        if life.isdigit() and stage in (None, of) and name[0] != ".":
            code, _, words = (folder / name).read_text(encoding="utf-8").strip().partition(" ")
            if code.isdigit():
                found.append(Outcome(of, int(life), int(code), words))
    return sorted(found, key=lambda outcome: outcome.life)


def names(folder: Path) -> list[str]:
    """Of the files in a folder; nothing where there is none (a copy may leave out what is empty)."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def done(folder: Path, stage: str) -> bool:
    """Whether some life of the stage ended with 0."""
    return any(outcome.code == 0 for outcome in read(folder, stage))
