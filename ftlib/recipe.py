"""Recipe + overrides -> RunSpec: reading YAML, applying SET=, finding the data."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from ftlib.errors import InputError, unknown
from ftlib.spec import RunSpec, validate

CLUSTER_PREFIX = "cluster."


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


def load(folder: Path, name: str, changes: dict[str, Any], data: str | None = None) -> RunSpec:
    """The recipe `name` with `changes` (dotted field -> value) and the data file, validated as a whole.
    Raises InputError with every problem at once."""
    return resolve(read(folder, name), name, changes, data)


def read(folder: Path, name: str) -> dict[str, Any]:
    """The fields that the recipe `name` gives; InputError names the recipes there are."""
    if name not in names(folder):
        raise InputError(unknown("MODEL", name, names(folder)))
    return read_yaml(folder / f"{name}.yaml")


def resolve(values: dict[str, Any], name: str, changes: dict[str, Any], data: str | None = None) -> RunSpec:
    """`load` for a recipe whose `values` have been read."""
    if data is not None:
        changes = {**changes, "data.path": data}
    # Saying one source replaces the recipe's other one.
    for said, other in (("data.path", "data.hub"), ("data.hub", "data.path")):
        if changes.get(said) and other not in changes:
            changes = {**changes, other: None}
    values = override(values, changes)
    # Saying one length replaces the recipe's other one: SET="train.epochs=3" needs no second word to drop the steps.
    train = values.get("train")
    if isinstance(train, dict):
        for said, other in (("steps", "epochs"), ("epochs", "steps")):
            if f"train.{said}" in changes and f"train.{other}" not in changes:
                train.pop(other, None)
    return validate(RunSpec, {**values, "recipe": name}, f"recipe {name}")


def read_spec(path: Path) -> RunSpec:
    """A run's frozen spec.json."""
    try:
        return RunSpec.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no spec of this version ({str(error).splitlines()[0]})") from None
