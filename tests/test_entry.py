"""Every stage of every recipe, on every profile, is entered with the devices that its own job would give it.

Its batch script's variables, Slurm's beside them, and the stage's real code as far as the loading of a model: only
torch's look at the machine is replaced, by one that sees what CUDA_VISIBLE_DEVICES shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftlib import allocation, recipe, rundir
from ftlib.errors import InputError
from ftlib.plan import numerics, shapes
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.stop import StopFlag
from jobs import chain, stage
from tests.cluster import Slurm
from tests.wishes import CHECKOUT, CLUSTERS, RECIPES, site, spec

torch = pytest.importorskip("torch", reason="the training packages are not installed (make setup)")

from ftlib.data import prepare as preparing  # noqa: E402
from ftlib.evaluate import answering  # noqa: E402
from ftlib.train import arguments, rendezvous, saving, watch  # noqa: E402
from ftlib.train import run as training  # noqa: E402

PROFILES = recipe.names(CLUSTERS)
ACCOUNT = {"hipergator": {"account": "lab"}}
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


class Reached(Exception):
    """A stage has come to the loading of its model, on this device."""


def profile_of(name: str) -> ClusterProfile:
    return site(name, **ACCOUNT.get(name, {}))


def plan_of(model: str, profile: ClusterProfile) -> RunPlan:
    from ftlib import modelfiles
    from ftlib.plan import plan

    wish = spec(model)
    files = modelfiles.locate(
        wish.model.name, wish.model.revision, checkout=CHECKOUT, cache=Path("/nonexistent"), internet=True
    )
    return plan.make(wish, profile, shapes.from_config(files.config, wish.model.name), data_bytes=None)


# -- what a job finds --------------------------------------------------------------------------------------------------


def exported(script: str) -> dict[str, str]:
    """The variables that a batch script sets before its prologue."""
    lines = (shlex.split(line) for line in script.splitlines() if line.startswith("export ") and "$((" not in line)
    return dict(word.split("=", 1) for _, word in (line[:2] for line in lines))


def given_by_slurm(script: str) -> dict[str, str]:
    """What srun sets in each task of a script's job; `test_this_is_what_slurm_sets` asks a real one."""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))
    wanted = options.get("gres") or options.get("gpus-per-node")
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    found = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    if wanted:
        count = int(wanted.rpartition(":")[2])
        found |= dict.fromkeys(DEVICE_VARIABLES, ",".join(map(str, range(count))))
        found["SLURM_GPUS_ON_NODE"] = str(count)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--gres=gpu:a100:1"], ["--gres=gpu:a100:2"], ["--gpus-per-node=a100:2"]])
def test_this_is_what_slurm_sets(slurm: Slurm, tmp_path: Path, options: list[str]) -> None:
    """The script hides GPUs, as that of a stage on a CPU does: srun sets the variable anew, or takes it away."""
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nexport CUDA_VISIBLE_DEVICES=\nsrun env\n")
    words = [*options, "--nodes=1", "--ntasks-per-node=1", "--mem=200", f"--output={tmp_path}/out", str(script)]
    slurm.wait(slurm.sbatch(*words), "COMPLETED", 60)
    told = dict(line.partition("=")[::2] for line in (tmp_path / "out").read_text().splitlines())
    expected = given_by_slurm("\n".join(f"#SBATCH {word}" for word in words))
    names = (*DEVICE_VARIABLES, "SLURM_GPUS_ON_NODE", "SLURM_NTASKS", "SLURM_LOCALID")
    assert {name: told.get(name) for name in names} == {name: expected.get(name) for name in names}


# -- what a stage does with it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the tiny recipe whose data is prepared; every recipe's run borrows it."""
    place = tmp_path_factory.mktemp("entry")
    wish = spec("tiny", data__pairs=200)
    run = rundir.create(place, "data", files(wish, plan_of("tiny", profile_of("local")), place), place)
    preparing.prepare(run, StopFlag())
    return run.prepared_file


def files(wish: Any, plan: RunPlan, place: Path) -> dict[str, Any]:
    tiny = str(CHECKOUT / "models" / "tiny-base")
    provenance = {
        "run": "tiny", "cache": str(place / "cache"), "model_path": tiny, "checkout": str(CHECKOUT), "data_path": None,
        "data_digest": "generated", "profile": {"gpu_idle_limit_min": 60},
    }  # fmt: skip
    return {
        "spec.json": wish.model_dump(mode="json"), "plan.json": plan.model_dump(mode="json"),
        numerics.FILE: numerics.first(wish, plan.model_dump(mode="json"), {}).model_dump(mode="json"),
        "provenance.json": provenance,
    }  # fmt: skip


@contextlib.contextmanager
def machine(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, real_gpus: bool) -> Iterator[None]:
    """A task's surroundings: its variables alone, and a torch that sees the GPUs that they show."""
    from accelerate.state import PartialState

    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("SLURM", "CUDA", "FT_", "GPU_", "ROCR")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    os.environ.update(environment)

    def count() -> int:
        return len(allocation.visible(os.environ, 0)) if real_gpus else 0

    chosen: list[int] = [0]
    patches: dict[str, Any] = {
        "device_count": count, "is_available": lambda: count() > 0, "current_device": lambda: chosen[0],
        "is_bf16_supported": lambda *_: True,
        "set_device": lambda device: chosen.append(torch.device(device).index or 0),
        "get_device_properties": lambda index: type("Gpu", (), {"uuid": "5a", "total_memory": 80 << 30})(),
    }  # fmt: skip
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    PartialState._reset_state()
    try:
        yield
    finally:
        PartialState._reset_state()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        monkeypatch.undo()
        os.environ.clear()
        os.environ.update(before)  # the entry itself sets some


def entered(run: RunDir, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Enter a stage as jobs.stage does; returns the device on which it would load its model."""

    def reached(device: Any) -> None:
        raise Reached(str(device))

    alone = run.numerics().world_size == 1 and not run.spec().zero.stage
    if not alone:  # the other ranks are not here to be met
        monkeypatch.setattr(rendezvous, "connect", lambda on_gpu, **_: reached("cuda:0" if on_gpu else "cpu"))
    monkeypatch.setattr(training, "load_base", lambda spec, path, device, *_, **__: reached(device))
    monkeypatch.setattr(
        answering.AutoModelForCausalLM, "from_pretrained", lambda *_, device_map, **__: reached(device_map)
    )
    monkeypatch.setattr(preparing, "prepare", lambda *_, **__: reached("none"))  # it loads no model
    devices = []
    real = arguments.prepare_process

    def prepared(*words: Any) -> Any:
        devices.append(real(*words))
        return devices[-1]

    def found(*_: Any) -> Any:
        return reached(devices[-1])

    if name == "export":
        from ftlib.export import run as exporting

        monkeypatch.setattr(exporting, "prepare_process", prepared)
        monkeypatch.setattr(saving, "find", found)  # a checkpoint to export: none was trained
    elif name == "train":
        monkeypatch.setattr(watch.GpuWatch, "__enter__", lambda self: self)  # NVML
    monkeypatch.setattr("submitit.JobEnvironment", lambda: type("Job", (), {"hostnames": ["n1"]})())
    stage._set_rank()
    asked = run.stage_plan(name)
    allocation.check(name, asked, os.environ)
    allocation.narrow(asked, os.environ)
    with pytest.raises(Reached) as reached_at:
        getattr(stage, name)(run, 1, StopFlag())
    return str(reached_at.value)


def expected_device(plan: RunPlan, name: str) -> str:
    asked = plan.stages[name]
    if name == "prepare":
        return "none"
    if name == "evaluate":
        several = asked.device == "cuda" and asked.gpus_per_node > 1
        return "auto" if several else str({"": asked.device})
    return "cuda:0" if asked.device == "cuda" else "cpu"


def run_of(model: str, plan: RunPlan, dataset: Path, place: Path) -> RunDir:
    run = rundir.create(place, f"{model}-{plan.cluster}", files(spec(model), plan, place), CHECKOUT)
    run.prepared_file.write_text(dataset.read_text())
    for made in ("merged", "adapter"):
        (run.export / made).mkdir(parents=True)
    return run


@pytest.mark.parametrize("cluster", PROFILES)
@pytest.mark.parametrize("model", recipe.names(RECIPES))
def test_every_stage_finds_the_devices_of_its_plan(
    model: str, cluster: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    profile = profile_of(cluster)
    try:
        plan = plan_of(model, profile)
    except InputError as error:
        # The site has no room for it, and says so before anything is queued.
        assert "resources" in str(error) or "does not fit" in str(error)
        return
    run = run_of(model, plan, dataset, tmp_path)
    gpu = profile.partition(gpu=True).gpu
    for stages in plan.jobs if profile.scheduler else [(name,) for name in STAGES]:
        environment: dict[str, str] = {}
        if profile.scheduler:
            made = chain.executor(
                profile, plan, stages, run.provenance(), run=run.path, comment="ftlib x y z", after=None
            )
            script = made.script()
            environment = {**exported(script), "CUDA_VISIBLE_DEVICES": "", **given_by_slurm(script)}
            if "SLURM_GPUS_ON_NODE" not in environment:
                del environment["CUDA_VISIBLE_DEVICES"]
        for name in stages:
            with machine(environment, monkeypatch, real_gpus=bool(gpu and not gpu.simulated)):
                assert entered(run, name, monkeypatch) == expected_device(plan, name), (name, capsys.readouterr().out)
