"""Recipe + overrides -> RunSpec: reading YAML, applying SET=, finding the data."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from ftlib.errors import InputError, unknown
from ftlib.spec import RunSpec, validate

CLUSTER_PREFIX = "cluster."
# A recipe gives one of these.
EITHER = (("data.path", "data.hub"), ("train.steps", "train.epochs"))


def names(folder: Path) -> list[str]:
    """Names of the recipes (or profiles) in a folder of YAML files."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; InputError says where it is malformed or unreadable."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is no valid YAML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{path}: must hold fields (name: value), found {type(values).__name__}")
    return values or {}


def parse_set(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """SET="a.b=c d.e=f" as two mappings from dotted field to value: the recipe's, and the cluster's.
    Values are YAML: 3 is a number, true a boolean, [a, b] a list. Quotes work as in a shell."""
    recipe: dict[str, Any] = {}
    cluster: dict[str, Any] = {}
    problems = []
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"SET: {error} in {text!r}") from None
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or not field or not all(field.split(".")):
            problems.append(f"SET: {word!r} is not of the form field=value, such as optim.lr=1e-4")
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        if field.startswith(CLUSTER_PREFIX):
            cluster[field[len(CLUSTER_PREFIX) :]] = parsed
        else:
            recipe[field] = parsed
    if problems:
        raise InputError(problems)
    return recipe, cluster


def override(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested `values` with each dotted field of `changes` put in."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for field, value in changes.items():
        *parents, leaf = field.split(".")
        place = merged
        for parent in parents:
            child = place.get(parent)
            place[parent] = dict(child) if isinstance(child, dict) else {}
            place = place[parent]
        place[leaf] = value
    return merged


def load(folder: Path, name: str, changes: dict[str, Any]) -> RunSpec:
    """The recipe `name` with `changes` (dotted field -> value), validated as a whole: InputError with every problem."""
    return resolve(read(folder, name), name, changes)


def read(folder: Path, name: str) -> dict[str, Any]:
    """The fields that the recipe `name` gives; InputError names the recipes there are."""
    if name not in names(folder):
        raise InputError(unknown("MODEL", name, names(folder)))
    return read_yaml(folder / f"{name}.yaml")


def resolve(values: dict[str, Any], name: str, changes: dict[str, Any], data: str | None = None) -> RunSpec:
    """`load` for a recipe whose `values` have been read, and a data file."""
    changes = changes if data is None else {**changes, "data.path": data}
    # Saying one source or length replaces the recipe's other: SET="train.epochs=3" needs no word to drop the steps.
    for said, other in EITHER + tuple(pair[::-1] for pair in EITHER):
        if changes.get(said) and other not in changes:
            changes = {**changes, other: None}
    return validate(RunSpec, {**override(values, changes), "recipe": name}, f"recipe {name}")
