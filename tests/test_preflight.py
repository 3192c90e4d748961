"""Faults of a site and of a node, each named with its mend: real where this machine can have them.

Drivers and GPUs are the exception: their answers are NVML's and torch's, given by the tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import InputError
from jobs import environment
from jobs import wish as wishes
from tests.cluster import Slurm
from tests.wishes import CHECKOUT, jobs, site

torch = pytest.importorskip("torch", reason="the training packages are not installed (make setup)")

from ftlib.train import preflight  # noqa: E402


class Nvml:
    """Answers as pynvml does."""

    def __init__(self, driver: str = "580.65.06", cuda: int = 13000, fails: str = "") -> None:
        self.driver, self.cuda, self.fails = driver, cuda, fails

    def nvmlInit(self) -> None:
        if self.fails:
            raise RuntimeError(self.fails)

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.cuda


@pytest.mark.parametrize(
    ("nvml", "wheel", "ok", "words", "mend"),
    [
        (Nvml(), "13.0", True, "driver 580.65.06 speaks CUDA 13.0", ""),
        (Nvml("560.35", 12060), "12.8", True, "speaks CUDA 12.6", ""),  # any minor version of the major one
        (Nvml("580.65", 13000), "12.6", True, "made for CUDA 12.6", ""),
        (Nvml("535.104", 12020), "13.0", False, "too old", "cp env/torch-cuda12.txt env/torch.txt"),
        (Nvml("535.104", 12020), "13.0", False, "too old", "CUDA 13 needs driver 580 or newer: choose nodes"),
        (Nvml("535.104", 12020), "13.0", False, "driver 535.104 speaks CUDA 12.2", "580 or newer"),
        (Nvml(), None, False, "made for the CPU", "make env"),
        (Nvml(fails="Driver Not Loaded"), "13.0", False, "Driver Not Loaded", "gpu_partition"),
    ],
)
def test_the_driver_beside_the_cuda_of_the_packages(nvml: Nvml, wheel: str, ok: bool, words: str, mend: str) -> None:
    check = preflight.driver(nvml, torch_version="2.13.0", wheel_cuda=wheel)
    assert check.ok is ok and words in check.words
    assert mend in check.mend and ("mend:" in check.line()) is not ok


@pytest.mark.parametrize(
    ("gpu", "built_for", "ok", "words"),
    [
        ((10, 0), ["sm_80", "sm_90", "sm_100"], True, "code for sm_100"),
        ((10, 3), ["sm_100"], True, "code for sm_100"),
        ((12, 0), ["sm_90", "compute_90"], True, "code for compute_90"),
        ((10, 0), ["sm_80", "sm_90"], False, "code for sm_80, sm_90 alone"),
        ((8, 0), ["sm_86", "sm_90"], False, "is sm_80"),
        ((8, 0), [], False, "no GPU alone"),
    ],
)
def test_a_gpu_that_the_packages_have_no_code_for(
    gpu: tuple[int, int], built_for: list[str], ok: bool, words: str
) -> None:
    check = preflight.capability("NVIDIA B200", gpu, built_for, torch_version="2.6.0")
    assert check.ok is ok and words in check.words
    assert ("CUDA 12.8 and torch 2.7" in check.mend) is (not ok and gpu >= (10, 0))
    assert ("capability 7.5 (T4) or newer and driver 580" in check.mend) is (not ok and gpu < (10, 0))


def test_a_job_that_sees_no_gpu_says_what_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    driver, gpu = preflight.gpu(asked=2, planned_gib=80)
    assert driver.ok and not gpu.ok
    assert gpu.words == "2 asked for, 0 seen; CUDA_VISIBLE_DEVICES is ''" and "gres" in gpu.mend
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(cuda=12020))  # type: ignore[arg-type]
    assert [check.name for check in preflight.gpu(asked=2, planned_gib=80)] == ["driver"]


def test_packages_that_come_before_the_locked_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.packages().ok
    (tmp_path / "peft-9.0.dist-info").mkdir()
    (tmp_path / "peft-9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = preflight.packages()
    assert not found.ok and f"peft of {tmp_path}" in found.words and "PYTHONPATH" in found.mend


def test_storage_is_measured_and_too_little_is_refused(odd_dir: Path) -> None:
    found = preflight.storage(odd_dir, need_bytes=1)
    assert found.ok and "MiB/s" in found.words and not list(odd_dir.iterdir())
    full = preflight.storage(odd_dir, need_bytes=2**60)
    assert not full.ok and "the run needs 1,073,741,824.0" in full.words


def test_caches_in_a_small_home_or_in_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in names:
        monkeypatch.setenv(name, str(tmp_path / "blue" / name))
    assert preflight.caches(40).ok
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    monkeypatch.setenv("HF_HOME", "/proc/none")
    found = preflight.caches(40)
    assert not found.ok and "XDG_CACHE_HOME is in the home folder of 40 GiB" in found.words
    assert "HF_HOME: " in found.words and "'cache' in cluster.yaml" in found.mend


def test_a_rank_that_never_arrives_is_named_with_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "31990"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preflight, "MEET_S", 1)
    found = preflight.collectives(on_gpu=False, name="a trial")
    assert not found.ok and found.words.startswith("rank 1 did not arrive within 1 s") and "NCCL_SOCKET" in found.mend


@pytest.fixture
def home_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder is not above this checkout, wherever that is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def shim(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of a site that this machine is not."""
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def faults(tmp_path: Path, **changes: Any) -> str:
    profile = site("local", **{"storage.home_gib": 40, "storage.work": "/blue/lab/{user}", **changes})
    with pytest.raises(InputError) as refused:
        environment.require(profile, profile.cache_dir(tmp_path / "checkout"))
    return "\n".join(refused.value.messages)


def test_what_would_fill_a_small_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setattr(wishes, "CHECKOUT", tmp_path / "checkout")
    said = faults(tmp_path)
    assert f"the checkout, with its packages and runs, would be in your home folder ({tmp_path}/checkout)" in said
    assert "move it to /blue/lab/ada" in said and "the cache would be in your home folder" in said
    monkeypatch.setattr(wishes, "CHECKOUT", CHECKOUT)
    environment.require(site("local", **{"storage.home_gib": 40}), Path("/blue"))


def test_submit_refuses_a_checkout_in_a_small_home_too() -> None:
    refused = jobs("submit", "--cluster", "hipergator", "--set", "cluster.account=lab", HOME=str(CHECKOUT.parent))
    assert refused.returncode == 64 and "would be in your home folder" in refused.stderr
    assert "/blue/lab" in refused.stderr and "Traceback" not in refused.stderr


def test_a_home_that_is_nearly_full_by_its_quota(
    home_elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim(
        tmp_path,
        "df",
        "Filesystem 1024-blocks Used Available Capacity Mounted on\nnfs:/home 1 1 0 9% /home",
        monkeypatch,
    )
    quota = "Disk quotas for user ada (uid 7):\n Filesystem blocks quota limit grace files quota limit grace\n"
    shim(tmp_path, "quota", f"{quota} nfs:/home 41523610* 41943040 41943040 6days 1 0 0", monkeypatch)
    assert "your home folder is 99% full" in faults(tmp_path)
    shim(tmp_path, "quota", f"{quota} nfs:/home 20971520 41943040 41943040 1 0 0", monkeypatch)
    environment.require(site("local", **{"storage.home_gib": 40}), Path("/blue"))


def test_a_module_that_is_not_there(home_elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASH_FUNC_module%%", '() { [ "$2" = cuda ] || { echo "unknown: $2" >&2; return 1; }; }')
    said = faults(tmp_path, modules=["cuda", "apptaner/1.4"])
    assert said.startswith("module load apptaner/1.4 fails: unknown: apptaner/1.4. 'module spider apptaner'")


def test_names_that_this_slurm_does_not_know(slurm: Slurm) -> None:
    def problems(**changes: Any) -> str:
        known = {"scheduler.slurm_conf": slurm.env["SLURM_CONF"], **changes}
        return "\n".join(environment.unknown_names(site("local-slurm", **known)))

    assert problems() == ""
    assert "account: Slurm does not know 'labb'" in problems(account="labb") and "Did you mean lab?" in problems(
        account="labb"
    )
    assert "It knows: group, group-b. Did you mean group-b?" in problems(qos="groupb")
    other = [{"name": "gpus", "cpus_per_node": 2, "mem_gib_per_node": 8, "max_time_min": 60}]
    assert "gpu_partition: Slurm does not know 'gpus' for you here. It knows: cpu, gpu. Did you mean gpu?" in problems(
        partitions=other, gpu_partition="gpus", cpu_partition="gpus"
    )
    gpu = {"type": "b200", "gres": "b200", "memory_gib": 178}
    wrong = [{**other[0], "name": "gpu", "gpu": gpu, "gpus_per_node": 1}, {**other[0], "name": "cpu"}]
    assert "GPU name in gpu: Slurm does not know 'b200' for you here. It knows: a100." in problems(partitions=wrong)


def test_an_interpreter_that_needs_the_login_shells_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ -n "$LD_LIBRARY_PATH" ] || { echo "libpython3.so: cannot open" >&2; exit 127; }\n')
    python.chmod(0o755)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/login/lib")
    (said,) = environment._interpreter(site("a100", python=str(python)))
    assert "does not start without your shell's LD_LIBRARY_PATH" in said and "libpython3.so: cannot open" in said
    assert environment._interpreter(site("a100")) == []
