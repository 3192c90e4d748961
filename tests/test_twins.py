"""The tiny twin of every real recipe, through all stages: here, and on the local Slurm.

A sample runs with `make test`; all of them with `make test-all`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib import recipe
from ftlib.rundir import RunDir
from tests.cluster import Slurm
from tests.test_chain import finished, log
from tests.wishes import RECIPES, jobs, run_names, status

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = pytest.mark.slow

TWINS = [name for name in recipe.names(RECIPES) if name.startswith("tiny-")]
SAMPLE = {"local": "tiny-falcon", "local-slurm": "tiny-llama3"}


def twins(cluster: str) -> list[object]:
    """Every twin, those beyond the sample marked."""
    return [name if name == SAMPLE[cluster] else pytest.param(name, marks=pytest.mark.nightly) for name in TWINS]


def submitted(checkout: Path, model: str, cluster: str) -> RunDir:
    before = set(run_names(checkout))
    done = jobs("submit", "--model", model, "--cluster", cluster, checkout=checkout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    (name,) = set(run_names(checkout)) - before
    return RunDir(checkout / "runs" / name)


def assert_whole(run: RunDir) -> None:
    spec = run.spec()
    assert run.evaluation_file.exists() and run.report_file.exists()
    assert (run.export / ("merged" if spec.export.merged else "adapter")).is_dir()


@pytest.mark.parametrize("model", twins("local"))
def test_a_twin_goes_through_all_stages_here(checkout: Path, model: str) -> None:
    run = submitted(checkout, model, "local")
    assert status(checkout, run.name)["state"] == "completed"
    assert_whole(run)


@pytest.mark.slurm
@pytest.mark.parametrize("model", twins("local-slurm"))
def test_a_twin_goes_through_all_stages_on_slurm(checkout: Path, model: str, slurm: Slurm) -> None:
    run = submitted(checkout, model, "local-slurm")
    assert finished(checkout, run)["state"] == "completed", log(run)
    assert_whole(run)
