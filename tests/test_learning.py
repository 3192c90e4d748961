"""The default run, whole: a tiny model learns functions that its base does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wishes import copied_checkout, run_names

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
# Four minutes of one core; `make test` runs the same chain with fewer steps (test_local_run.py).
pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]

MOST_RESIDENT_GIB = 3
# Runs the command and says how much memory its largest process held.
MEASURED = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "print('MAXRSS_KIB', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def test_the_default_run_learns_what_its_base_does_not_know(tmp_path: Path) -> None:
    checkout = copied_checkout(tmp_path)
    command = [sys.executable, "-m", "jobs", "submit", "--cluster", "local"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], cwd=checkout, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = run_names(checkout)
    scores = json.loads((checkout / "runs" / name / "evaluation.json").read_text())
    base, tuned, copied = scores["base"], scores["tuned"], scores["copy"]
    assert tuned["n"] >= 200
    assert tuned["valid_json"] >= 0.95 and tuned["function"] >= 0.95
    assert tuned["exact"] >= base["exact"] + 0.6 and tuned["exact"] >= copied["exact"] + 0.6
    assert base["exact"] <= 0.2, "the base knows the functions already: nothing would be shown"
    assert tuned["perplexity"] < base["perplexity"]
    resident_gib = int(done.stdout.rsplit("MAXRSS_KIB ", 1)[1]) / 2**20
    assert resident_gib <= MOST_RESIDENT_GIB
