"""A stage refuses what its plan does not say, and a single process uses one GPU of two."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ftlib import allocation
from ftlib.errors import InputError
from tests.wishes import CHECKOUT

CPU = {"device": "cpu", "partition": "cpu", "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
ONE = {"device": "cuda", "partition": "gpu", "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 1}
SIMULATED = {**ONE, "device": "cpu"}
TWO = {**ONE, "gpus_per_node": 2}
RANKS = {**ONE, "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4}


def slurm(gpus: str, **more: str) -> dict[str, str]:
    """The variables that a task finds on the local Slurm (22.05); `gpus`: as "0,1"."""
    found = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURMD_NODENAME": "n1"}
    if gpus:
        names = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
        found |= {**dict.fromkeys(names, gpus), "SLURM_GPUS_ON_NODE": str(len(gpus.split(",")))}
    return {**found, **more}


@pytest.mark.parametrize(
    ("plan", "environment"),
    [
        (CPU, {}),
        (ONE, {}),  # outside Slurm
        (CPU, slurm("")),
        (CPU, slurm("", CUDA_VISIBLE_DEVICES="NoDevFiles")),
        (ONE, slurm("0")),
        (SIMULATED, slurm("1")),
        (ONE, slurm("0,1")),  # in the job that it shares with an evaluation over two
        (TWO, slurm("GPU-a1,GPU-b2")),
        (ONE, slurm("MIG-GPU-5a/1/0")),
        (RANKS, slurm("0,1,2,3", SLURM_NTASKS="8")),
    ],
)
def test_what_the_plan_says_passes(plan: dict[str, Any], environment: dict[str, str]) -> None:
    allocation.check("train", plan, environment)


@pytest.mark.parametrize(
    ("plan", "environment", "words"),
    [
        (ONE, slurm(""), "asks for 1 GPU a node of partition 'gpu', but Slurm gave job 7 no GPU on node n1"),
        (SIMULATED, slurm(""), "asks for 1 GPU a node"),
        (TWO, slurm("0"), "asks for 2 GPUs a node of partition 'gpu', but Slurm gave job 7 1 GPU on node n1"),
        (CPU, slurm("0"), "is for a CPU (partition 'cpu'), but Slurm gave job 7 1 GPU on node n1"),
        (TWO, slurm("0,1", CUDA_VISIBLE_DEVICES="1"), "shows this process 1 GPU of 2 ('1')"),
        (ONE, slurm("0", SLURM_NTASKS="2"), "is for 1 x 1 processes, but Slurm started 2"),
    ],
)
def test_anything_else_is_refused_in_words_that_name_both(
    plan: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(InputError) as error:
        allocation.check("export", plan, environment)
    assert words in str(error.value) and str(error.value).startswith("export: ")


@pytest.mark.parametrize(
    ("plan", "before", "after"),
    [
        (ONE, None, "0"),  # a workstation with two GPUs
        (ONE, "1,0", "1"),
        (ONE, "GPU-a1,GPU-b2", "GPU-a1"),
        (ONE, "MIG-c3, MIG-d4", "MIG-c3"),
        (TWO, "0,1,2", "0,1"),  # an evaluation over two
        (RANKS, "0,1,2,3", "0,1,2,3"),  # NCCL wants to see its peers' GPUs
        (CPU, None, ""),  # a node whose GPUs no cgroup hides
        (SIMULATED, "0,1", ""),
    ],
)
def test_a_single_process_sees_the_gpus_of_its_plan_alone(plan: dict[str, Any], before: str | None, after: str) -> None:
    environment = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
    allocation.narrow(plan, environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == after


def test_the_trainer_counts_one_gpu_where_torch_sees_two(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    from accelerate.state import PartialState

    from ftlib.plan import numerics
    from ftlib.train.arguments import training_arguments
    from tests.wishes import planned, site, spec

    PartialState._reset_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    wish = spec("llama2-7b")
    begun = numerics.first(wish, planned(wish, site("a100")).model_dump(mode="json"), {})
    try:
        arguments = training_arguments(wish, begun, 10, tmp_path)
        assert str(arguments.device) == "cuda:0"
        assert (arguments.n_gpu, arguments.train_batch_size) == (1, begun.micro_batch)
    finally:
        PartialState._reset_state()  # it is one for the process, and would keep the device


def test_a_node_that_shows_fewer_gpus_than_it_should_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    from ftlib.errors import BadGpu
    from ftlib.runs import diagnosis
    from ftlib.train.arguments import check_gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadGpu, match=r"shows 1 of its 2 GPUs \(CUDA_VISIBLE_DEVICES: '0,1'\)") as error:
        check_gpus("evaluate", TWO)
    assert diagnosis.from_outcome(error.value.exit_code, str(error.value)) == "bad GPU"
    # None at all may be the packages' or the driver's doing, on every node: no other is tried.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds none on"):
        check_gpus("evaluate", TWO)


def test_it_stands_on_the_standard_library_alone() -> None:
    code = "import sys, ftlib.allocation; print([m for m in ('torch', 'pydantic', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
