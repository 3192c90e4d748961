"""Specs, profiles and plans for tests, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ftlib import profile, recipe
from ftlib.plan import numerics, plan, shapes
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.runs.overrides import Overrides
from ftlib.spec import RunSpec

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES, CLUSTERS = CHECKOUT / "jobs" / "recipes", CHECKOUT / "slurm_templates" / "clusters"
TINY = shapes.from_config(
    {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 900,
        "tie_word_embeddings": True,
    },
    "tiny",
)
LLAMA_7B = shapes.from_config(shapes.KNOWN["meta-llama/Llama-2-7b-hf"], "llama")


def spec(name: str = "tiny", **changes: Any) -> RunSpec:
    """A recipe with changes; `optim__lr=1` stands for optim.lr."""
    return recipe.load(RECIPES, name, {key.replace("__", "."): value for key, value in changes.items()})


def site(name: str, **changes: Any) -> ClusterProfile:
    """A cluster profile with changes."""
    return profile.load(CLUSTERS, name, changes)


def planned(spec: RunSpec, site: ClusterProfile) -> RunPlan:
    """The plan of a recipe's run, on the shape of its model."""
    return plan.make(spec, site, LLAMA_7B if "llama" in spec.recipe else TINY, data_bytes=None)


def set_numerics(run: RunDir, *, nodes: int | None = None, micro_batch: int | None = None, **changes: Any) -> None:
    """Store other numerics in a run folder; the rows of an optimizer step stay the same."""
    stored = numerics.stored(run.path).overridden(Overrides(nodes=nodes, micro_batch=micro_batch))
    if stored.zero and "compute_dtype" in changes:
        changes["zero"] = {**stored.zero, "bf16": {"enabled": changes["compute_dtype"] == "bfloat16"}}
    numerics.write(run.path, stored.model_copy(update=changes))


def copied_checkout(parent: Path) -> Path:
    """A copy of the checkout without runs, in a folder with a space and quotes: they must pass through every shell."""
    place = parent / "ada's \"copy\""
    place.mkdir()
    for name in ("ftlib", "jobs", "slurm_templates", "models", "samples", "env"):
        shutil.copytree(CHECKOUT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    if elsewhere := os.environ.get("FTLIB_SLURM_DIR"):
        local = place / "slurm_templates" / "clusters" / "local-slurm.yaml"
        local.write_text(local.read_text().replace("/tmp/ftlib-slurm", elsewhere))
    return place


def jobs(*words: str, checkout: Path = CHECKOUT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m jobs WORDS` in a checkout, as a user would run it."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def status(checkout: Path, run: str, **environment: str) -> dict[str, Any]:
    """`status --json` of one run."""
    done = jobs("status", "--json", "--run", run, checkout=checkout, **environment)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["runs"]
    assert isinstance(found, dict)
    return found


def run_names(checkout: Path) -> list[str]:
    """Names of the checkout's runs."""
    return sorted(path.parent.name for path in (checkout / "runs").glob("*/spec.json"))
