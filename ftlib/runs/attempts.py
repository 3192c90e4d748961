"""Attempts: one small file each in `RUN/lives/`, named STAGE-NUMBER, created by the prologue before anything else runs.

Its one line: the job's id, the node, when it began (seconds since 1970), then NAME:BYTES for every log that earlier
attempts have appended to: this attempt's part begins there. A crash may have cut the line short.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Attempt:
    """One start of a stage's job."""

    stage: str
    number: int  # from 1
    job_id: str = ""  # Slurm's, of an array's task ARRAY_INDEX; the starting process's id without Slurm
    node: str = ""  # where rank 0 runs; "local" without Slurm
    began: int = 0  # seconds since 1970; 0 where it was killed while it wrote that down
    log_starts: Mapping[str, int] = field(default_factory=dict)  # name of a log -> bytes that earlier attempts wrote


def file_name(stage: str, number: int) -> str:
    """Name of an attempt's file, of its outcome and of its events' writer."""
    return f"{stage}-{number}"


def parse(stage: str, number: int, text: str) -> Attempt:
    """The attempt whose file holds `text`."""
    words = text.split()
    sizes = (word.rpartition(":") for word in words[3:])
    return Attempt(
        stage=stage,
        number=number,
        job_id=words[0] if words else "",
        node=words[1] if len(words) > 1 else "",
        began=int(words[2]) if len(words) > 2 and words[2].isdigit() else 0,
        log_starts={name: int(size) for name, _, size in sizes if size.isdigit()},
    )


def read(folder: Path) -> dict[str, tuple[Attempt, ...]]:
    """Stage -> its attempts, the first one first."""
    by_stage: dict[str, list[Attempt]] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    for name in names:
        stage, _, number = name.rpartition("-")
        if stage and number.isdigit():
            with open(f"{folder}/{name}", encoding="utf-8", errors="replace") as file:
                by_stage.setdefault(stage, []).append(parse(stage, int(number), file.read()))
    return {stage: tuple(sorted(some, key=lambda one: one.number)) for stage, some in by_stage.items()}
