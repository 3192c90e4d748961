"""What a run stands on, tried on the node before it starts; what failed is said with its mend. torch comes inside."""

import importlib
import os
import re
import shutil
import site
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ftlib.errors import FtError
from ftlib.plan import gpus

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets", "tokenizers")
# Less than the profile says by more than this: another GPU, or a slice of one.
MEMORY_SHARE = 0.93
WRITE_MIB = 64
COMMITS = 5
MEET_S = 120
REDUCED_MIB = {True: 256, False: 4}


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    words: str
    mend: str = ""

    def line(self) -> str:
        """For a log: name, verdict, what was found, and the mend of what failed."""
        mend = f"\n{'':24}mend: {self.mend}" if self.mend and not self.ok else ""
        return f"{'ok' if self.ok else 'FAILED':7} {self.name:15} {self.words}{mend}"


def packages() -> Check:
    """The locked packages lie in this interpreter's own folder, and nothing of ~/.local comes before them."""
    missing, strays = [], []
    for name in PACKAGES:
        try:
            place = str(metadata.distribution(name).locate_file(""))
            strays += [f"{name} of {place}"] if os.path.commonpath([place, sys.prefix]) != sys.prefix else []
        except metadata.PackageNotFoundError:
            missing.append(name)
    if site.ENABLE_USER_SITE and (user := site.getusersitepackages()) in sys.path:
        strays.append(f"anything in {user}")
    if missing:
        return Check("packages", False, f"not installed for {sys.executable}: {', '.join(missing)}", "make env")
    if strays:
        words = f"other packages come before those of {sys.prefix}: {', '.join(strays)}"
        mend = "unset PYTHONPATH, set PYTHONNOUSERSITE=1, and move ~/.local/lib/python* away"
        return Check("packages", False, words, mend)
    return Check("packages", True, f"torch {metadata.version('torch')} and {len(PACKAGES) - 1} more in {sys.prefix}")


def imports() -> Check:
    """All that a training loads, loaded; on a slow file system that takes a while."""
    began = time.perf_counter()
    try:
        importlib.import_module("ftlib.train.run")
    except Exception as error:  # a broken library can raise anything
        return Check("imports", False, f"{type(error).__name__}: {error}", "remove the virtual environment, make env")
    return Check("imports", True, f"loaded in {time.perf_counter() - began:.1f} s")


def driver(nvml: Any, *, torch_version: str, wheel_cuda: str | None) -> Check:
    """Whether the node's driver runs programs of the wheel's CUDA (any minor version of its major one).
    nvml: the pynvml module. wheel_cuda: torch.version.cuda, such as 13.0; None in a wheel for the CPU."""
    if wheel_cuda is None:
        return Check(
            "driver", False, f"torch {torch_version} is made for the CPU, but this job has a GPU",
            "pip took a wheel without CUDA: look at 'pip config list', remove the virtual environment, make env")
    try:
        nvml.nvmlInit()
        version, number = nvml.nvmlSystemGetDriverVersion(), int(nvml.nvmlSystemGetCudaDriverVersion())
    except Exception as error:  # NVMLError is a class of a module that is passed in
        return Check(
            "driver", False, f"the NVIDIA driver does not answer here: {error}",
            f"is {os.uname().nodename} a GPU node? 'gpu_partition' in cluster.yaml says where jobs go")
    speaks, major = f"{number // 1000}.{number % 1000 // 10}", int(wheel_cuda.split(".")[0])
    found = f"driver {version} speaks CUDA {speaks}, torch {torch_version} is made for CUDA {wheel_cuda}"
    if number // 1000 >= major:
        return Check("driver", True, found)
    oldest = gpus.OLDEST_DRIVER.get(major)
    needed = f"CUDA {major} needs driver {oldest} or newer" if oldest else f"CUDA {major} needs a newer driver"
    way = f". Or, {gpus.FOR_CUDA_12}" if number // 1000 == 12 and major > 12 else ""
    return Check(
        "driver", False, f"the driver is too old for the packages: {found}",
        f"{needed}: choose nodes that have it ('gpu_partition', 'constraint' in cluster.yaml), or ask the site{way}")


def capability(name: str, found: tuple[int, int], built_for: Sequence[str], *, torch_version: str) -> Check:
    """Whether torch has code for a GPU of compute capability `found`. built_for: torch.cuda.get_arch_list()."""
    sm = f"sm_{found[0]}{found[1]}"
    for arch in built_for:
        if not (parts := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch)):
            continue
        there = int(parts[2]), int(parts[3])
        # Machine code runs on later minor versions of its major one; PTX (compute_) on all that are later.
        if there <= found and (there[0] == found[0] or parts[1] == "compute"):
            return Check("capability", True, f"{name} is {sm}, torch has code for {arch}")
    mend = f"{gpus.NEEDED}: choose another 'gpu_partition' in cluster.yaml"
    if found >= (10, 0):
        mend = f"{sm} needs CUDA 12.8 and torch 2.7, or newer: remove the virtual environment, make env"
    words = f"{name} is {sm}; torch {torch_version} has code for {', '.join(built_for) or 'no GPU'} alone"
    return Check("capability", False, words, mend)


def gpu(*, asked: int, planned_gib: float) -> Iterator[Check]:
    """Driver, the GPUs that are seen, their code, memory beside the profile's, and a product computed there."""
    import torch

    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        yield Check("driver", False, "the package nvidia-ml-py, which asks it, is not installed", "make env")
        return
    yield (first := driver(nvml, torch_version=torch.__version__, wheel_cuda=torch.version.cuda))
    if not first.ok:
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < asked:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" ({said[-1].message})" if said else ""
        yield Check(
            "GPU", False, f"{asked} asked for, {seen} seen; CUDA_VISIBLE_DEVICES is {visible!r}{why}",
            "compare 'ask_gpus_by' and the GPU's 'gres' in the profile with 'sinfo -o \"%P %G\"'; ask the site about "
            f"node {os.uname().nodename}")
        return
    device = int(os.environ.get("LOCAL_RANK", "0"))
    name = torch.cuda.get_device_name(device)
    able, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    yield (code := capability(name, able, built_for, torch_version=torch.__version__))
    if not code.ok:
        return
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    small = memory < MEMORY_SHARE * planned_gib
    yield Check(
        "GPU", not small, f"{seen} x {name}, {memory:.1f} GiB" + f"; the profile says {planned_gib:g}" * small,
        "set memory_gib of the partition's GPU in the profile to what is there: plans count on it")
    yield _computes(device)


def _computes(device: int) -> Check:
    import torch

    try:
        left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        there = (left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)).float().cpu()
        off = float((there - left @ right).abs().max())
    except RuntimeError as error:
        mend = f'a fault of node {os.uname().nodename}: SET="cluster.exclude=<it>"'
        return Check("CUDA", False, str(error).partition("\n")[0], mend)
    words = f"a product in bf16 is {off:.2g} off the CPU's"
    # Rounding to bf16 moves the largest of these sums by 0.3.
    return Check("CUDA", off < 1, words, "the GPU computes wrongly: exclude its node")


def storage(folder: Path, *, need_bytes: int) -> Check:
    """Free space for the whole run, and how fast `folder` takes a file and a small commit, both with fsync."""
    free = shutil.disk_usage(folder).free
    words, block = f"{folder}: {free / 2**30:,.0f} GiB free", os.urandom(2**20)
    if free < need_bytes:
        words += f", the run needs {need_bytes / 2**30:,.1f}"
        return Check("storage", False, words, "free some, or move the checkout")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            file_s = _written(Path(place) / "large", block, WRITE_MIB)
            commit_s = statistics.median(_written(Path(place) / str(i), block[:4096], 1) for i in range(COMMITS))
    except OSError as error:
        return Check("storage", False, f"{words}, and cannot be written: {error}", "see its quota (quota, lfs quota)")
    return Check("storage", True, f"{words}, {WRITE_MIB / file_s:,.0f} MiB/s, {commit_s * 1000:.1f} ms a commit")


def _written(path: Path, block: bytes, times: int) -> float:
    """Seconds until `times` blocks are written and on storage."""
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(times):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def caches(home_gib: float | None) -> Check:
    """Caches can be written and do not fill a small home folder."""
    home = Path.home().resolve()
    faults, places = [], []
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        place = Path(os.environ.get(name) or home / ".cache")
        places.append(str(place))
        if home_gib is not None and home in (place.resolve(), *place.resolve().parents):
            faults.append(f"{name} is in the home folder of {home_gib:.0f} GiB ({place})")
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            faults.append(f"{name}: {error}")
    mend = "name a folder on group storage as 'cache' in cluster.yaml"
    return Check("caches", not faults, "; ".join(faults) or os.path.commonpath(places), mend)


def collectives(*, on_gpu: bool, name: str) -> Check:
    """All ranks meet and reduce over the device, as at each start and step of a training; who does not is named.
    Leaves no process group behind. name: of this job, so that another's port is not taken for ours."""
    import torch
    from torch import distributed as dist

    from ftlib.train import ranks, rendezvous

    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    began = time.perf_counter()
    try:
        rendezvous.connect(on_gpu=on_gpu, name=name, wait_s=MEET_S)
        met_s = time.perf_counter() - began
        values = torch.ones(REDUCED_MIB[on_gpu] * 2**18, device=ranks.device())
        began = time.perf_counter()
        dist.all_reduce(values)
        right = bool((values == ranks.world_size()).all())
    except (FtError, RuntimeError) as error:
        return Check(
            "collectives", False, str(error).partition("\n")[0],
            "'ip -br addr' on a node lists interfaces; NCCL_SOCKET_IFNAME in the partition's 'environment' names what "
            "nodes share, and NCCL_DEBUG=INFO there tells more")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    # What each link carries, as nccl-tests counts it.
    world, taken = ranks.world_size(), time.perf_counter() - began
    speed = 2 * (world - 1) / world * values.nbytes / taken / 1e9
    words = f"{world} ranks met in {met_s:.1f} s, sum {values.nbytes / 2**20:.0f} MiB at {speed:.2f} GB/s"
    return Check("collectives", right, words, "the sum is wrong: exclude the nodes of this job and tell the site")


def peak_gib(device: str) -> float:
    """This process's largest memory so far, in GiB: the GPU's with CUDA's own part, or the host's."""
    import resource

    import torch

    if device != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info()
    return (torch.cuda.max_memory_reserved() + max(0, total - free - torch.cuda.memory_reserved())) / 2**30
