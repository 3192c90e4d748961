"""The training packages are installed by a CPU job where there is a Slurm: real make, Slurm and set-up, with a pip that
installs nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.cluster import Slurm
from tests.processes import started
from tests.wishes import CHECKOUT, copied_checkout

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# In a job it can be slow, or fail; on this machine it installs the login node's packages.
PIP = """echo "pip $*"
if [ -n "$SLURM_JOB_ID" ]; then
    [ ! -e slow ] || sleep 60
    [ ! -e broken ] || { echo 'ERROR: broken'; exit 1; }
fi
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout whose virtual environment has everything but the training packages' stamp."""
    checkout = copied_checkout(tmp_path)
    shutil.copy(CHECKOUT / "Makefile", checkout)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (checkout / ".venv" / "pyvenv.cfg").touch()
    python.write_text(f'#!/bin/sh\nif [ "$2" = pip ]; then\n{PIP}\nexit\nfi\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return checkout


def make(place: Path, slurm: Slurm) -> AbstractContextManager[subprocess.Popen[str]]:
    """`make fetch` of a model that is a folder: all that it needs is the packages."""
    environment = {name: value for name, value in slurm.env.items() if not name.startswith("OPT_")}
    words = ["make", "fetch", "CLUSTER=local-slurm", f"SET=cluster.scheduler.slurm_conf={slurm.env['SLURM_CONF']}"]
    return started(words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stamps(place: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (place / ".venv").glob(".*-*"))


def test_a_cpu_job_installs_them_and_what_it_left_half_done_is_not_used(place: Path, slurm: Slurm) -> None:
    owner = place / ".venv" / "setup.pid"
    (place / "slow").touch()
    with make(place, slurm) as first:
        deadline = time.monotonic() + 60
        while not owner.exists() or len(owner.read_text().split()) < 3:
            assert time.monotonic() < deadline and first.poll() is None, os.listdir(place / ".venv")
            time.sleep(0.05)
        job = owner.read_text().split()[2]
        slurm.run(["scancel", "--signal=KILL", "--full", job])
        said = first.communicate(timeout=60)[0]
    assert first.returncode != 0 and "ended before the packages were installed" in said and stamps(place) == [".login"]
    (place / "slow").unlink()

    (place / "broken").touch()
    with make(place, slurm) as second:
        said = second.communicate(timeout=60)[0]
    assert second.returncode != 0 and "ERROR: broken" in said and stamps(place) == [".login"], said
    (place / "broken").unlink()

    with make(place, slurm) as third:
        said = third.communicate(timeout=60)[0]
    assert third.returncode == 0, said
    assert stamps(place) == [".login", ".train"] and "Set-up: torch (env/torch.txt)" in said
    assert "Nothing to fetch: the model of tiny is the folder" in said
    found = re.search(r"Job (\d+) installs the training packages", said)
    assert found is not None
    # The controller's word: accounting may know the job without its name for a while.
    shown = slurm.run(["scontrol", "show", "job", "-o", found[1]])
    assert "JobName=ftlib.packages" in shown and "gres/gpu" not in shown and "Partition=cpu" in shown
