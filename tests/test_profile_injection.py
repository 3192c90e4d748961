"""No text of a profile, wherever it comes from, adds a line to a job's script."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from ftlib import profile, recipe
from ftlib.errors import InputError
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.slurm import batch
from jobs import placement
from tests.wishes import CLUSTERS, jobs, planned, site, spec

INJECTED = "x\n#SBATCH --uid=0"
NOT_ONE_LINE = ["a\nb", "a\rb", "a\0b", "a\x0bb", "a\x1b[2Jb", "a\u2028b"]
# One of everything that may be left out, so that each text has a place.
WHOLE: dict[str, Any] = {
    "partitions": [
        {
            "name": "gpu",
            "gpu": {"type": "a100", "memory_gib": 79},
            "gpus_per_node": 8,
            "cpus_per_node": 128,
            "mem_gib_per_node": 2000,
            "max_time_min": 60,
        },
        {"name": "cpu", "cpus_per_node": 64, "mem_gib_per_node": 250, "max_time_min": 60},
    ],
    "scheduler": {"cluster_name": "a100"},
    "storage": {},
    "container": {},
}


def text_fields(annotation: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every text in a value of this type: field names, 0 for a list's first, 'A' for the value of a variable.
    A Literal is no text: another value of it is refused anyway."""
    origin = get_origin(annotation)
    if annotation is str:
        yield path
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        hints = typing.get_type_hints(annotation)
        for name in annotation.model_fields:
            yield from text_fields(hints[name], (*path, name))
    elif origin in (Union, types.UnionType):
        for choice in get_args(annotation):
            yield from text_fields(choice, path)
    elif origin is tuple:
        yield from text_fields(get_args(annotation)[0], (*path, 0))
    elif origin is dict:
        yield from text_fields(get_args(annotation)[1], (*path, "A"))
    else:
        assert origin is Literal or annotation in (int, float, bool, type(None)), f"{path}: is {annotation} a text?"


# The name is the file's, not what stands in it.
FIELDS = [path for path in text_fields(ClusterProfile) if path != ("name",)]


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested `values` with another value at `path`."""
    if not path:
        return value
    head, *rest = path
    if head == 0:
        return [changed(values[0] if values else None, tuple(rest), value), *(values or [])[1:]]
    return {**(values or {}), head: changed((values or {}).get(head), tuple(rest), value)}


def test_every_kind_of_text_is_looked_at() -> None:
    found = {".".join(map(str, path)) for path in FIELDS}
    assert {"account", "qos", "mail_user", "exclude", "python", "cache", "modules.0", "environment.A"} <= found
    assert {"partitions.0.name", "partitions.0.constraint", "partitions.0.gpu.gres"} <= found
    assert {"scheduler.slurm_conf", "container.command", "container.binds.0", "storage.work"} <= found


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_line_break_in_any_text_is_refused_with_the_fields_name(path: tuple[Any, ...], tmp_path: Path) -> None:
    values = {**recipe.read_yaml(CLUSTERS / "a100.yaml"), **WHOLE}
    (tmp_path / "a100.yaml").write_text(yaml.safe_dump(changed(values, path, INJECTED)))
    with pytest.raises(InputError) as refused:
        profile.load(tmp_path, "a100", {})
    field = ".".join(map(str, path)).replace(".0", "").removesuffix(".A")
    where = [line for line in refused.value.messages if "printable characters on one line" in line]
    assert len(where) == 1 and where[0].replace(".0", "").startswith(f"cluster a100: {field}:"), refused.value.messages


@pytest.mark.parametrize("text", NOT_ONE_LINE, ids=repr)
def test_no_control_character_passes(text: str) -> None:
    with pytest.raises(InputError, match=r"account: .* has the character"):
        site("a100", account=text)


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(InputError) as refused:
        site("a100", account=INJECTED, mail_user=INJECTED, exclude=INJECTED)
    assert len(refused.value.messages) == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("A; touch /tmp/x; B", "Did you mean A__touch__tmp_x__B?"),
        ("NCCL-IFNAME", "Did you mean NCCL_IFNAME?"),
        ("1A", "Did you mean _1A?"),
        ("A=B", "Did you mean A_B?"),
        ("", "no name of a variable"),
        ("FT_RUN", "is set for each job by ftlib itself"),
    ],
)
@pytest.mark.parametrize("place", ["environment", "partitions"])
def test_a_variables_name_is_one(name: str, hint: str, place: str) -> None:
    values: Any = {name: "1"}
    if place == "partitions":
        values = [{**WHOLE["partitions"][0], "environment": values}, WHOLE["partitions"][1]]
    with pytest.raises(InputError) as refused:
        site("a100", **{place: values})
    (line,) = refused.value.messages
    assert "environment: " in line and hint in line


def test_set_is_refused_with_exit_64_and_a_line_for_each_field() -> None:
    # A shell's quotes around YAML's own, in which \n is a line break.
    settings = """cluster.account='"a\\n#SBATCH --uid=0"' cluster.environment='{"A B": "1"}'"""
    done = jobs("submit", "--model", "llama2-7b", "--cluster", "a100", "--dry-run", "--set", settings)
    assert done.returncode == 64 and "#SBATCH --uid" not in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: cluster a100: ") for line in lines), done.stderr


def test_a_stored_profile_is_refused_when_its_run_is_resumed(tmp_path: Path) -> None:
    stored = site("a100").model_dump(mode="json") | {"account": INJECTED}

    (tmp_path / "provenance.json").write_text(json.dumps({"profile": stored}))
    with pytest.raises(InputError, match=r"provenance.json: .*account"):
        placement.owners_profile(RunDir(tmp_path))


def test_what_reaches_sbatch_besides_the_profile_is_looked_at_too() -> None:
    cluster = site("a100")
    stage = planned(spec("llama2-7b"), cluster).stages["train"].model_copy(update={"partition": INJECTED})
    with pytest.raises(InputError, match=r"sbatch --partition: .* printable characters on one line"):
        batch.parameters(cluster, stage, name="a-run.train", setup=[], comment="", dependency=None)
