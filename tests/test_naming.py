"""Which run folder belongs to a request, and when it is another run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftlib import naming
from ftlib.naming import Request
from tests.wishes import spec


def request(**changes: object) -> Request:
    return Request(spec=spec(**changes), data_digest="d", cluster="c")


def make(runs: Path, name: str, made_for: Request) -> Path:
    """A run folder, as far as its name depends on it."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(made_for.spec.model_dump_json())
    provenance = {"data_digest": made_for.data_digest, "cluster": made_for.cluster}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def test_identical_settings_find_the_existing_run(odd_dir: Path) -> None:
    wanted = request()
    assert naming.choose(odd_dir, wanted) == naming.RunName(name=wanted.name, exists=False)
    make(odd_dir, wanted.name, request(description="other words"))
    found = naming.choose(odd_dir, wanted)
    assert (found.name, found.exists, found.message) == (wanted.name, True, "")
    another = naming.choose(odd_dir, wanted, new=True)
    assert (another.name, another.exists, another.message) == (f"{wanted.name}-2", False, "")


@pytest.mark.parametrize("other", ["settings", "data", "cluster", "unreadable", "empty"])
def test_a_folder_that_holds_another_resolved_spec_is_another_run(odd_dir: Path, other: str) -> None:
    """Such as one of an earlier version, in which a default was another."""
    wanted = request()
    made_for = {
        "settings": request(optim__lr=0.5),
        "data": Request(spec=wanted.spec, data_digest="e", cluster="c"),
        "cluster": Request(spec=wanted.spec, data_digest="d", cluster="x"),
    }.get(other, wanted)
    folder = make(odd_dir, wanted.name, made_for)
    if other == "unreadable":
        (folder / "spec.json").write_text("{")
    elif other == "empty":
        (folder / "spec.json").unlink()
    found = naming.choose(odd_dir, wanted)
    assert (found.name, found.exists) == (f"{wanted.name}-2", False)
    assert found.message == f"{wanted.name} holds another run's settings, so this run is {wanted.name}-2."
    make(odd_dir, found.name, wanted)
    assert naming.choose(odd_dir, wanted).exists and naming.choose(odd_dir, wanted).name == found.name


def test_a_spec_of_a_version_without_a_field_counts_with_the_field_s_default(odd_dir: Path) -> None:
    wanted = request()
    folder = make(odd_dir, wanted.name, wanted)
    values = json.loads((folder / "spec.json").read_text())
    del values["optim"]["max_grad_norm"], values["tracking"]
    (folder / "spec.json").write_text(json.dumps(values))
    assert naming.choose(odd_dir, wanted).exists is (wanted.spec.tracking == type(wanted.spec.tracking)())


def test_a_name_that_is_taken_by_chance_gets_a_suffix(odd_dir: Path) -> None:
    wanted = request()
    assert naming.choose(odd_dir, wanted, taken=[wanted.name]).name == f"{wanted.name}-2"
