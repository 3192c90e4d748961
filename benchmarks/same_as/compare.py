"""Differences of two sides' parts, and which of them are intended (intended.yaml beside this file)."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.same_as.results import Parts

INTENDED = Path(__file__).with_name("intended.yaml")
# So many lines of context surround a difference of scripts.
CONTEXT = 2


class Intended(BaseModel):
    """A change that was made on purpose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str = Field(description="Shell pattern of the cases it is in, such as 'qlora*' or '* on a100'")
    part: str = Field(description="Shell pattern of the parts it is in, such as 'merged weights' or 'export.sbatch'")
    lines: tuple[str, ...] = Field(
        (".*",), min_length=1, description="Regular expressions, each for whole lines of the difference, with - or +"
    )
    reason: str = Field(min_length=10, description="Why it was changed")


class Renamed(BaseModel):
    """A script that has another name now; its text is compared with the old one's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    was: str = Field(description="Name of the script then")
    now: str = Field(description="Name of the script now")
    reason: str = Field(min_length=10, description="Why it was renamed")


class IntendedChanges(BaseModel):
    """The file of all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    changes: tuple[Intended, ...] = ()
    renamed: tuple[Renamed, ...] = ()

    def as_now(self, then: Parts, now: Parts) -> Parts:
        """The earlier side's parts under the names that they have now."""
        named: Parts = {}
        for part, value in then.items():
            for entry in self.renamed:
                # An array's script goes on with its number of points: "train.sbatch, 5 points".
                script, comma, rest = part.partition(",")
                if script == entry.was and entry.now + comma + rest in now:
                    part = entry.now + comma + rest
            named[part] = value
        return named


def read_intended(file: Path = INTENDED) -> IntendedChanges:
    """The intended changes; pydantic's ValidationError names what is wrong with the file."""
    return IntendedChanges.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})


@dataclass(frozen=True)
class Line:
    """One line that differs, and why that is as it should be."""

    text: str  # begins with - (then), + (now), or a space (context)
    intended: Intended | None = None

    @property
    def differs(self) -> bool:
        """Whether it is more than context."""
        return not self.text.startswith(" ")

    @property
    def wrong(self) -> bool:
        """Whether it differs without having been intended."""
        return self.differs and self.intended is None


@dataclass(frozen=True)
class PartResult:
    """One part of a case on both sides."""

    case: str
    part: str
    lines: tuple[Line, ...]  # empty: equal

    @property
    def wrong(self) -> bool:
        """Whether something differs that was not meant to."""
        return any(line.wrong for line in self.lines)

    @property
    def reasons(self) -> list[str]:
        """Why it was changed, each reason once."""
        return list(dict.fromkeys(line.intended.reason for line in self.lines if line.intended))


def compare(case: str, then: Parts, now: Parts, intended: IntendedChanges) -> list[PartResult]:
    """The parts of a case, in the order of this tree's side."""
    then = intended.as_now(then, now)
    found = []
    for part in [*now, *(part for part in then if part not in now)]:
        lines = [_judged(case, part, text, intended) for text in difference(then.get(part), now.get(part))]
        found.append(PartResult(case, part, tuple(lines)))
    return found


def failed_alike(case: str, code: int) -> PartResult:
    """What is said of a case in which nothing could be compared, because both sides end with the same error."""
    return PartResult(case, "exit code", (Line(f"+both sides end with {code}: nothing was compared"),))


def difference(then: Any, now: Any) -> list[str]:
    """Lines that say how two values differ, - for then and + for now; none where they are equal."""
    if then == now:
        return []
    if then is None or now is None:
        return ["+(not there then)"] if then is None else ["-(not there now)"]
    if isinstance(then, dict) and isinstance(now, dict):
        lines = []
        for key in [*then, *(key for key in now if key not in then)]:
            if then.get(key) != now.get(key):
                lines += [f"-{key}: {then.get(key)}", f"+{key}: {now.get(key)}"]
        return lines
    before, after = str(then).splitlines(), str(now).splitlines()
    diff = list(difflib.unified_diff(before, after, n=CONTEXT, lineterm=""))
    return [line for line in diff[2:] if not line.startswith("@@")]


def _judged(case: str, part: str, text: str, intended: IntendedChanges) -> Line:
    line = Line(text)
    if not line.differs:
        return line
    for entry in intended.changes:
        applies = fnmatchcase(case, entry.case) and fnmatchcase(part, entry.part)
        if applies and any(re.fullmatch(pattern, text) for pattern in entry.lines):
            return Line(text, entry)
    return line


def no_longer_there(results: list[PartResult], intended: IntendedChanges) -> list[str]:
    """Intended changes (and single patterns of them) that no difference matched: the file must be made true again."""
    texts: dict[Intended, list[str]] = {}
    for result in results:
        for line in result.lines:
            if line.intended:
                texts.setdefault(line.intended, []).append(line.text)
    found = []
    for entry in intended.changes:
        for pattern in entry.lines:
            if not any(re.fullmatch(pattern, text) for text in texts.get(entry, ())):
                found.append(f"{entry.case}, {entry.part}: no difference is {pattern!r} ({entry.reason})")
    parts = {result.part.partition(",")[0] for result in results}
    for script in intended.renamed:
        if script.now not in parts:
            found.append(f"no script is called {script.now!r} ({script.reason})")
    return found
