"""The scripts of every real recipe are accepted by a Slurm that is shaped like the site: `sbatch --test-only`.

The controller is real. Its nodes are powered up on demand, so it plans with nodes that are not there.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ftlib import recipe
from ftlib.profile import ClusterProfile
from tests.cluster import Slurm
from tests.processes import started
from tests.wishes import RECIPES, copied_checkout, jobs, site

REAL = [name for name in recipe.names(RECIPES) if not name.startswith("tiny")]
SITES = ("hipergator", "a100")

CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
GresTypes=gpu
"""


def conf_of(profile: ClusterProfile, folder: Path, munge: Path) -> str:
    """slurm.conf of a site with four nodes in each partition."""
    assert profile.scheduler
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = socket.gethostname().partition(".")[0]
    text = CONF.format(name=profile.scheduler.cluster_name, host=host, port=port, folder=folder, munge=munge)
    for part in profile.partitions:
        gpus = f" Gres=gpu:{part.gpu.gres}:{part.gpus_per_node}" if part.gpu else ""
        memory = int(part.mem_gib_per_node * 1024)
        text += f"NodeName={part.name}-[1-4] CPUs={part.cpus_per_node} RealMemory={memory}{gpus} State=CLOUD\n"
        text += f"PartitionName={part.name} Nodes={part.name}-[1-4] MaxTime={part.max_time_min}\n"
    return text


@contextmanager
def controller(profile: ClusterProfile, folder: Path, slurm: Slurm) -> Iterator[dict[str, str]]:
    """A slurmctld of the site's shape, and the environment that speaks to it."""
    (folder / "state").mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(conf_of(profile, folder, Path(slurm.env["SLURM_CONF"]).parent / "run" / "munge.socket"))
    (folder / "gres.conf").touch()
    environment = {**slurm.env, "SLURM_CONF": str(conf)}
    program = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert program
    log = folder / "out"
    with log.open("w") as out, started([program, "-D"], env=environment, stdout=out, stderr=out) as daemon:
        deadline = time.monotonic() + 20
        ping = ["scontrol", "ping"]
        while b" is UP" not in subprocess.run(ping, env=environment, capture_output=True, timeout=60).stdout:
            assert time.monotonic() < deadline and daemon.poll() is None, log.read_text()
            time.sleep(0.2)
        yield environment


def scripts(text: str) -> dict[str, str]:
    """Stage -> script, out of a dry run's output; the dependencies on jobs that are not there left out."""
    parts = re.split(r"^===== ([\w+]+)\.sbatch.* =====\n", text, flags=re.MULTILINE)
    bodies = [body.split("\nDry run:")[0] for body in parts[2::2]]
    without = [re.sub(r"^#SBATCH --dependency.*\n", "", body, flags=re.MULTILINE) for body in bodies]
    return dict(zip(parts[1::2], without, strict=True))


@pytest.mark.parametrize("name", SITES)
def test_every_recipes_scripts_are_accepted_by_the_site(name: str, slurm: Slurm, tmp_path: Path) -> None:
    checkout = copied_checkout(tmp_path)
    profile = site(name, account="lab")
    with controller(profile, tmp_path / "ctld", slurm) as environment:
        for what in (
            *(["submit", "--model", model] for model in REAL),
            ["sweep", "--sweep", "random", "--model", "llama2-7b"],
        ):
            model = what[-1]
            words = [*what, "--cluster", name, "--dry-run", "--set", "cluster.account=lab"]
            done = jobs(*words, checkout=checkout)
            assert done.returncode == 0, done.stderr
            found = scripts(done.stdout)
            assert ("DeepSpeed's configuration" in done.stdout) == ("full" in model or "zero" in model)
            last = ["export", "evaluate"] if "DeepSpeed's configuration" in done.stdout else ["export+evaluate"]
            assert list(found) == ["prepare", "train", *last]
            for stage, script in found.items():
                tested = subprocess.run(
                    ["sbatch", "--test-only"],
                    input=script,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                assert tested.returncode == 0, f"{model} {stage}: {tested.stderr}"
                side = profile.partition(gpu=stage in ("train", "evaluate", "export+evaluate")).name
                assert f"in partition {side}" in tested.stderr
        # It does refuse what the site has not.
        refused = script.replace("--gres=gpu:", "--gres=gpu:none")
        answer = subprocess.run(["sbatch", "--test-only"], input=refused, env=environment, text=True, timeout=60)
        assert answer.returncode != 0
