"""What a function is, and the two catalogues written by hand (functions.yaml)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ftlib.data.values import Value


@dataclass(frozen=True)
class Argument:
    """Free values of a `kind` (a pool of ftlib.data.values), or `choices`: each value and the words that say it."""

    name: str
    kind: str = ""
    choices: Mapping[Value, str] | None = None


@dataclass(frozen=True)
class Function:
    """A function: its arguments in order, and question phrasings with every argument as `{name}`."""

    name: str
    arguments: tuple[Argument, ...]
    phrasings: tuple[str, ...]


def natural() -> tuple[Function, ...]:
    """Everyday functions to fine-tune on."""
    return _written()["natural"]


def unseen() -> tuple[Function, ...]:
    """Functions like the natural ones that no training sees."""
    return _written()["unseen"]


@cache
def _written() -> dict[str, tuple[Function, ...]]:
    groups = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {
        group: tuple(
            Function(name, tuple(_argument(*item) for item in said["arguments"].items()), tuple(said["phrasings"]))
            for name, said in functions.items())
        for group, functions in groups.items()
    }


def _argument(name: str, values: str | list[Value] | dict[Value, str]) -> Argument:
    if isinstance(values, str):
        return Argument(name, kind=values)
    return Argument(name, choices=values if isinstance(values, dict) else {value: str(value) for value in values})
