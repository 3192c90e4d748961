"""What a function is, and the two catalogues written by hand (functions.yaml).

Each function has at least one free argument (`Argument.kind`): closed choices, such as a unit or a bool,
appear in every split, so only free values can be held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ftlib.data.values import Value


@dataclass(frozen=True)
class Argument:
    """A typed argument: free values of a `kind` (a pool of ftlib.data.values) or closed `choices`.

    `choices` maps each value to the words that say it in a question.
    """

    name: str
    kind: str = ""
    choices: Mapping[Value, str] | None = None


@dataclass(frozen=True)
class Function:
    """A function: its arguments in order, and question phrasings with every argument as `{name}`."""

    name: str
    arguments: tuple[Argument, ...]
    phrasings: tuple[str, ...]


@cache
def natural() -> tuple[Function, ...]:
    """Everyday functions to fine-tune on."""
    return _catalogue()["natural"]


@cache
def unseen() -> tuple[Function, ...]:
    """Functions like the natural ones that no training sees."""
    return _catalogue()["unseen"]


@cache
def _catalogue() -> dict[str, tuple[Function, ...]]:
    written = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {
        group: tuple(
            Function(name, tuple(_argument(*item) for item in said["arguments"].items()), tuple(said["phrasings"]))
            for name, said in functions.items()
        )
        for group, functions in written.items()
    }


def _argument(name: str, values: str | list[Value] | dict[Value, str]) -> Argument:
    if isinstance(values, str):
        return Argument(name, kind=values)
    return Argument(name, choices=values if isinstance(values, dict) else {value: str(value) for value in values})
