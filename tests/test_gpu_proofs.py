"""What a machine without a GPU can prove about one. docs/gpu.md lists these and the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wishes import CHECKOUT, spec

torch = pytest.importorskip("torch", reason="the training packages are not installed (make setup)")

from benchmarks.gpu_check import pack  # noqa: E402
from ftlib.plan import gpus, memory, shapes  # noqa: E402
from ftlib.train import preflight  # noqa: E402
from tests import fake_memory, fat_binaries  # noqa: E402

# The GPUs of the profiles, and their neighbors: A100, A40, L40S, H100, B200, and the RTX cards of a workstation.
WANTED = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DOWNLOAD_S = 600
KEPT = {"train__gradient_checkpointing": False}


class TestMemory:
    """The planner's activations beside bytes that are counted. Part 8 of the release narrows these bands to 5 %."""

    # Layers (of Llama-2-7B, which has 32), rows, tokens a row, the recipe's changes; then plan/counted as it is today,
    # at least and at most. A few layers are enough for every change: what counts is the sum of blocks and head.
    SETTINGS = (
        pytest.param(4, 8, 1024, {}, 1.0, 1.45, id="4 layers"),
        pytest.param(4, 8, 1024, KEPT, 0.78, 1.0, id="4 layers, no recomputation"),
        pytest.param(32, 8, 1024, {}, 1.0, 1.25, id="8 x 1024", marks=pytest.mark.nightly),
        pytest.param(32, 1, 2048, {}, 1.0, 1.25, id="1 x 2048", marks=pytest.mark.nightly),
        pytest.param(32, 8, 1024, KEPT, 0.74, 1.0, id="no recomputation", marks=pytest.mark.nightly),
        pytest.param(32, 8, 1024, {**KEPT, "method__dropout": 0.0}, 0.87, 1.0, id="no recomputation, no dropout",
                     marks=pytest.mark.nightly),
    )  # fmt: skip

    @pytest.mark.parametrize(("layers", "rows", "seq_len", "changes", "least", "most"), SETTINGS)
    def test_the_plan_beside_a_counted_step(
        self, layers: int, rows: int, seq_len: int, changes: dict[str, object], least: float, most: float
    ) -> None:
        config = {**shapes.KNOWN["meta-llama/Llama-2-7b-hf"], "num_hidden_layers": layers}
        recipe = spec("llama2-7b", data__seq_len=seq_len, **changes)
        counted_gib = fake_memory.training_step_gib(config, recipe, rows)
        planned_gib = memory.activation_bytes(shapes.from_config(config, "llama"), recipe, rows) / memory.GIB
        print(f"planned {planned_gib:.2f}, counted {counted_gib:.2f} GiB: {planned_gib / counted_gib:.3f}")
        assert least <= planned_gib / counted_gib <= most

    def test_what_is_freed_is_not_counted(self) -> None:
        with fake_memory.LiveBytes() as live:
            for _ in range(3):
                kept = torch.ones(1000)
                kept.view(10, 100).add_(1)
        assert 4000 <= live.peak <= 8000 and live.now == 4000
        del kept
        assert live.now == 0


class TestCode:
    """Which GPUs the packages have code for, and the driver that they need."""

    def test_bitsandbytes_has_code_for_every_gpu_of_the_profiles(self) -> None:
        """In the library that torch's CUDA picks: preflight asks torch alone, so both have to agree."""
        import bitsandbytes

        library = Path(bitsandbytes.__file__).parent / "libbitsandbytes_cuda130.so"
        built_for = sorted(fat_binaries.architectures(library))
        for gpu in WANTED:
            assert preflight.capability("a GPU", gpu, built_for, torch_version="-").ok, (gpu, built_for)
        assert not preflight.capability("V100", (7, 0), built_for, torch_version="-").ok
        assert library.name in pack.KEPT_LIBRARIES

    def test_a_library_without_gpu_code_has_none(self) -> None:
        import bitsandbytes

        assert fat_binaries.architectures(Path(bitsandbytes.__file__).parent / "libbitsandbytes_cpu.so") == set()
        with pytest.raises(ValueError, match="no 64-bit ELF"):
            fat_binaries.architectures(Path(__file__))

    def test_docs_and_preflight_name_the_driver_that_torch_needs(self) -> None:
        """The lock leaves torch's CUDA packages out, by name: those of CUDA 13 end with cu13."""
        left_out = re.findall(r"^# nvidia-\w+-cu(\d+)$", (CHECKOUT / "env" / "train.lock").read_text(), re.MULTILINE)
        [major] = {int(number) for number in left_out}
        assert major == gpus.LOCKED_CUDA
        oldest = gpus.OLDEST_DRIVER[major]
        page = (CHECKOUT / "docs" / "gpu.md").read_text()
        assert f"driver {oldest} or newer" in page and f"CUDA {major}" in page

    @pytest.mark.nightly
    def test_the_registry_says_so_too(self, tmp_path: Path) -> None:
        """What torch's own wheel for a GPU requires."""
        wanted = [line for line in torch_requirements(tmp_path) if line.startswith("cuda-toolkit==")]
        major = int(wanted[0].split("==")[1].split(".")[0])
        left_out = (CHECKOUT / "env" / "train.lock").read_text()
        assert major in gpus.OLDEST_DRIVER and f"# nvidia-cudnn-cu{major}\n" in left_out


def torch_requirements(folder: Path) -> list[str]:
    """Everything that the locked torch needs on Linux with a GPU, by the registry; skips without a network."""
    # A folder of wheels that pip is told of would offer the CPU's.
    environment = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "UV_FIND_LINKS")}
    command = [
        sys.executable, "-m", "uv", "pip", "compile", str(CHECKOUT / "env" / "torch.txt"), "--no-header",
        "--no-annotate", "--python-version=3.11", "--python-platform=x86_64-unknown-linux-gnu"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"the package registry could not be asked: {done.stderr[-300:]}")
    return done.stdout.splitlines()


def installed(target: Path, *requirements: str) -> dict[str, str]:
    """An environment in which `requirements`, without theirs, come before the installed packages; skips offline."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
    if done.returncode:
        pytest.skip(f"the package registry could not be asked: {done.stderr[-300:]}")
    return {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{CHECKOUT}", "HF_HUB_OFFLINE": "1"}


@pytest.mark.nightly
class TestOtherPackages:
    """Packages that are not installed, taken from the registry: too long for every change."""

    def test_ligers_kernels_compile_for_gpus_that_are_not_there(self, tmp_path: Path) -> None:
        if not shutil.which("cc") and not shutil.which("gcc"):
            pytest.skip("triton needs a C compiler at run time, and there is none")
        triton = next(line for line in torch_requirements(tmp_path) if line.startswith("triton=="))
        liger = pack.locked((CHECKOUT / "env" / "gpu-check.txt").read_text())["liger-kernel"].split()[0]
        environment = installed(tmp_path / "packages", triton, liger)
        environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, "tests/compile_kernels.py", "90", "100"], cwd=CHECKOUT, env=environment,
            capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(rows) == 14 and {row["sm"] for row in rows} == {"90", "100"}
        assert all(row["bytes"] > 1000 for row in rows)

    def test_models_are_the_same_under_an_older_transformers(self, tmp_path: Path) -> None:
        """A bare GPU machine's transformers: imports and models stand, the Trainer's arguments do not. That is why
        gpu-check brings the locked one."""
        older = installed(tmp_path / "packages", "transformers==5.17.0", "huggingface_hub==1.33.0")
        locked = {**older, "PYTHONPATH": str(CHECKOUT)}
        found = []
        for environment in (older, locked):
            done = subprocess.run(
                [sys.executable, "tests/older_transformers.py"], cwd=CHECKOUT, env=environment, capture_output=True,
                text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            found.append(json.loads(done.stdout.splitlines()[-1]))
        assert [one["transformers"] for one in found] == ["5.17.0", "5.23.0"]
        assert found[0]["models"] == found[1]["models"]
        assert "activation_checkpointing" in found[0]["arguments"] and not found[1]["arguments"]
