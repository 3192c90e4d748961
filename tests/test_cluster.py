"""The local test cluster does what the other Slurm tests build on."""

# ruff: noqa: F811 - the fixture's name is the argument's
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import Slurm, command, eventually, slurm  # noqa: F401

Submit = Callable[..., str]


@pytest.fixture
def batch(slurm: Slurm, tmp_path: Path) -> Iterator[Submit]:
    """Submits a bash script with one GPU, from tmp_path; its job is cancelled when the test ends."""
    jobs: list[str] = []

    def submit(script: str, *args: str) -> str:
        path = tmp_path / f"{len(jobs)}.sh"
        path.write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        options = ("--gpus-per-node=1", "--time=2", "--open-mode=append", f"--output={tmp_path}/%j.out")
        jobs.append(slurm.sbatch(*options, *args, str(path)))
        return jobs[-1]

    yield submit
    if jobs:
        slurm.run(["scancel", *jobs])


def test_nodes_offer_gpus_and_up_is_idempotent(slurm: Slurm) -> None:
    lines = slurm.run(["sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %c %m %G"]).splitlines()
    assert lines == [f"n{i} 8 64000 gpu:a100:2" for i in (1, 2, 3)]
    again = command("up")
    assert again.returncode == 0 and "already up" in again.stdout
    assert command("status").stdout.rstrip().endswith("healthy")


def test_job_sees_its_gpus_node_name_and_accounting(slurm: Slurm, batch: Submit, tmp_path: Path) -> None:
    job = batch("echo $SLURM_CONF; srun sh -c 'echo $CUDA_VISIBLE_DEVICES on $SLURMD_NODENAME'", "--gpus-per-node=2")
    slurm.wait(job, "COMPLETED", 30)
    conf, gpus = (tmp_path / f"{job}.out").read_text().splitlines()
    assert conf == slurm.env["SLURM_CONF"]
    assert gpus.startswith("0,1 on n")

    def accounted() -> tuple[str, ...]:
        row = slurm.sacct(job)[0]
        return row["State"], row["Account"], row["QOS"]

    assert eventually(lambda: accounted() == ("COMPLETED", "lab", "group")), accounted()
    assert "gres/gpu=2" in slurm.sacct(job)[0]["ReqTRES"]


def test_requeued_job_keeps_its_id_and_runs_again(slurm: Slurm, batch: Submit, tmp_path: Path) -> None:
    job = batch('echo life $SLURM_RESTART_COUNT; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100')
    slurm.wait(job, "RUNNING", 30)
    slurm.run(["scontrol", "requeue", job])
    slurm.wait(job, "COMPLETED", 45)
    assert (tmp_path / f"{job}.out").read_text().split("\n")[-2] == "life 1"

    def lives() -> list[str]:
        return [row["State"] for row in slurm.sacct(job) if row["JobID"] == job]

    assert eventually(lambda: lives() == ["REQUEUED", "COMPLETED"]), lives()


def test_preemption_warns_the_step_and_leaves_the_batch_shell_its_grace(
    slurm: Slurm, batch: Submit, tmp_path: Path
) -> None:
    (tmp_path / "worker").write_text("trap 'sleep 4; exit 75' TERM; touch ready; while :; do sleep 0.2; done")
    # No trap in the batch shell: it lives to see the step's exit code only because the grace spares it.
    script = "[ -z $SLURM_RESTART_COUNT ] || exit 0\nsrun bash worker\necho $? >code\nscontrol requeue $SLURM_JOB_ID"
    low = batch(script, "--qos=group-b", "--nodelist=n3", "--gpus-per-node=2")
    slurm.wait(low, "RUNNING", 30)
    assert eventually((tmp_path / "ready").exists)
    high = batch("true", "--nodelist=n3", "--gpus-per-node=2")
    slurm.wait(high, "COMPLETED", 40)
    assert (tmp_path / "code").read_text() == "75\n"
    assert slurm.state(low) == "PENDING"
    assert eventually(lambda: slurm.sacct(low)[0]["State"] == "REQUEUED"), slurm.sacct(low)


@pytest.mark.parametrize("folder", ["/tmp/with space", "relative", "/usr"])
def test_a_folder_that_is_not_its_own_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLIB_SLURM_DIR", folder)
    refused = command("up")
    assert (refused.returncode, refused.stdout) in ((64, ""), (77, ""))
    assert "Traceback" not in refused.stderr
