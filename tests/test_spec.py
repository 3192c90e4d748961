"""A recipe and its overrides become one frozen wish, or every error at once."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from ftlib import recipe
from ftlib.errors import InputError
from ftlib.spec import OptimSpec, RunSpec
from tests.wishes import RECIPES, spec


def messages(**changes: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        spec(**changes)
    assert caught.value.exit_code == 64
    return caught.value.messages


@pytest.mark.parametrize("name", recipe.names(RECIPES))
def test_every_recipe_is_valid(name: str) -> None:
    assert spec(name).recipe == name


def test_all_errors_are_told_at_once_with_the_nearest_name() -> None:
    told = messages(optim__lrr=1, optim__schedule="cosinus", train__global_batch=0, modle=3)
    assert len(told) == 4
    text = "\n".join(told)
    assert "optim.lrr is no known field" in text and "Did you mean lr?" in text
    assert "'cosinus'" in text and "Did you mean cosine?" in text
    assert "train.global_batch" in text and "greater than or equal to 1 (found 0)" in text
    assert "Did you mean model?" in text


def test_a_field_at_the_wrong_level_is_shown_its_place() -> None:
    assert "Did you mean optim.lr?" in messages(lr=1)[0]


def test_numbers_as_people_write_them() -> None:
    changes, cluster = recipe.parse_set("optim.lr=1e-4 data.limit=1000 cluster.account=lab cluster.qos='a b'")
    assert cluster == {"account": "lab", "qos": "a b"}
    made = recipe.load(RECIPES, "tiny", changes)
    assert (made.optim.lr, made.data.limit) == (1e-4, 1000)


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3", "'open"])
def test_set_without_field_and_value_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="SET"):
        recipe.parse_set(text)


def test_saying_epochs_replaces_the_recipes_steps() -> None:
    assert spec(train__epochs=2).train.steps is None
    assert "exactly one" in messages(train__epochs=2, train__steps=3)[0]


def test_micro_batch_must_divide_the_global_batch() -> None:
    assert "fitting micro_batch values: [1, 2, 4, 8]" in messages(train__micro_batch=5)[0]


def test_the_same_wish_has_the_same_hash_and_another_has_another() -> None:
    def name(digest: str = "d", cluster: str = "c", **changes: object) -> str:
        return spec(**changes).run_hash(data_digest=digest, cluster=cluster)

    assert name() == name(optim__lr="4.0e-3") == name(description="other words")
    assert len({name(), name(digest="e"), name(cluster="x"), name(optim__lr=1e-3)}) == 4


def test_a_new_field_with_a_default_changes_no_run_s_id() -> None:
    class LaterOptimSpec(OptimSpec):
        momentum: float = Field(0.9, description="A later version's field")

    class LaterSpec(RunSpec):
        optim: LaterOptimSpec = LaterOptimSpec()
        note: str | None = Field(None, description="Another one")

    def run_hash(kind: type[RunSpec], **changes: object) -> str:
        values = recipe.override(spec("llama2-7b").model_dump(), changes)
        return kind.model_validate(values).run_hash(data_digest="d", cluster="c")

    assert run_hash(LaterSpec) == run_hash(RunSpec)
    assert run_hash(LaterSpec, **{"optim.momentum": 0.8}) != run_hash(RunSpec) != run_hash(RunSpec, **{"optim.lr": 0.5})


def test_a_wish_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        spec().optim.lr = 1.0  # type: ignore[misc]


def test_malformed_recipe_says_where(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(InputError, match=r"bad\.yaml: is no valid YAML"):
        recipe.load(tmp_path, "bad", {})
