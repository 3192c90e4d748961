"""Attempts: one small file each in `RUN/lives/`, named STAGE-NUMBER, created by the prologue before anything else runs.

Its one line: the job's id, the node, when it began (seconds since 1970), then NAME:BYTES for every log that earlier
attempts have appended to: this attempt's part begins there. A crash may have cut the line short.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload


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


class _Files(Sequence[Attempt]):
    """The attempts of a stage, the first one first; a file is read when its attempt is first asked for. Thousands of
    runs are looked at only to count their attempts, and a shared file system opens files slowly."""

    def __init__(self, folder: Path | str, stage: str, numbers: list[int]) -> None:
        self._folder = folder
        self._stage = stage
        self._numbers = sorted(numbers)
        self._attempts: dict[int, Attempt] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Attempt: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Attempt]: ...

    def __getitem__(self, index: int | slice) -> Attempt | Sequence[Attempt]:
        if isinstance(index, slice):
            return [self._read(number) for number in self._numbers[index]]
        return self._read(self._numbers[index])

    def _read(self, number: int) -> Attempt:
        if number not in self._attempts:
            path = f"{self._folder}/{file_name(self._stage, number)}"
            with open(path, encoding="utf-8", errors="replace") as file:
                self._attempts[number] = parse(self._stage, number, file.read())
        return self._attempts[number]


def read(folder: Path | str) -> dict[str, Sequence[Attempt]]:
    """Stage -> its attempts, the first one first."""
    numbers: dict[str, list[int]] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    for name in names:
        stage, _, number = name.rpartition("-")
        if stage and number.isdigit():
            numbers.setdefault(stage, []).append(int(number))
    return {stage: _Files(folder, stage, of_stage) for stage, of_stage in numbers.items()}
