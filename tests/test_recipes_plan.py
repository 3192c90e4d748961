"""What a login node says of each recipe: its plan, and what is wrong before anything is queued."""

from __future__ import annotations

import json

import pytest

from ftlib import recipe
from tests.wishes import CHECKOUT, RECIPES, jobs


@pytest.mark.parametrize("name", recipe.names(RECIPES))
def test_every_recipe_has_a_plan_on_an_a100(name: str) -> None:
    done = jobs("plan", "--json", "--model", name, "--cluster", "a100")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["gpu_needed_gib"] < plan["gpu_memory_gib"] and plan["gpu_hours"] < 24
    if name == "codellama-13b":
        assert plan["accumulation"] == 4 and plan["gpu_needed_gib"] < 32e9 / 2**30


def test_a_share_of_the_data_takes_a_share_of_the_steps() -> None:
    steps = {}
    for share in (0.01, 0.1):
        settings = f"data.share={share}"
        done = jobs("plan", "--json", "--model", "llama-7b-alpaca", "--cluster", "a100", "--set", settings)
        steps[share] = json.loads(done.stdout)["steps"]
    assert steps[0.1] == pytest.approx(10 * steps[0.01], rel=0.1)


def test_a_file_replaces_the_recipes_dataset() -> None:
    data = str(CHECKOUT / "samples" / "alpaca.jsonl")
    done = jobs("plan", "--model", "llama-7b-alpaca", "--cluster", "a100", "--data", data)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_the_model_or_the_site_is_refused() -> None:
    wrong = jobs("plan", "--model", "falcon-7b", "--cluster", "a100", "--set", "method.targets=[q_proj]")
    assert wrong.returncode == 64 and "method.targets: 'q_proj' is unknown. Allowed: dense" in wrong.stderr
    wrong = jobs("plan", "--model", "llama3-8b", "--cluster", "a100", "--set", "method.train_layers=[h.3,30-40]")
    assert wrong.returncode == 64 and "'h.3' matches no parameter; h is no part of any" in wrong.stderr
    data = str(CHECKOUT / "samples" / "oasst_trees.jsonl")
    wrong = jobs("plan", "--model", "llama2-7b", "--cluster", "a100", "--data", data)
    assert wrong.returncode == 64 and "is a conversation; data.template=alpaca holds none" in wrong.stderr
