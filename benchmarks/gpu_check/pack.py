"""The pack: wheels that a GPU machine without a network lacks, collected on a machine that has one.

    make gpu-check ARGS=--pack        (python -m benchmarks.gpu_check --pack)

The versions and hashes are the locks'. torch and numpy are the GPU machine's own. bitsandbytes brings a library for
every CUDA since 11.8 and for other makers' GPUs; the pack keeps those for a CPU and for CUDA 13.0, 4 of 43 MB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / ".gpu-wheels"
LOCKS = ("env/train.lock", "env/login.lock", "env/gpu-check.txt")
# What training, export and evaluation import, with all that it needs in turn, without torch's own needs.
PACKAGES = (
    "accelerate", "annotated-doc", "annotated-types", "anyio", "bitsandbytes", "click", "cloudpickle", "h11", "hf-xet",
    "httpcore2", "httpx2", "huggingface-hub", "idna", "liger-kernel", "markdown-it-py", "mdurl", "nvidia-ml-py",
    "packaging", "peft", "psutil", "pydantic", "pydantic-core", "pygments", "pyyaml", "regex", "rich", "safetensors",
    "shellingham", "submitit", "tokenizers", "tqdm", "transformers", "truststore", "typer", "typing-extensions",
    "typing-inspection")
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64", "manylinux_2_24_x86_64",
             "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_12_x86_64", "manylinux2010_x86_64")
KEPT_LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")
LIMIT_MB = 64
DOWNLOAD_S = 900


def locked(lock_text: str) -> dict[str, str]:
    """The entries of a lock by package, one line each: `name==version` with its hashes, as pip reads them."""
    entries: dict[str, str] = {}
    name = ""
    for line in lock_text.splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            name = line.partition("==")[0].strip()
            # A marker is about the machine that the lock serves; this one is chosen by pip's options.
            entries[name] = line.rstrip("\\ ").partition(";")[0].rstrip()
        elif name and line.startswith("    --hash="):
            entries[name] += " " + line.strip("\\ ")
        else:
            name = ""
    return entries


def requirements() -> str:
    """What the pack holds, for pip, with hashes. KeyError where no lock has a package."""
    entries: dict[str, str] = {}
    for lock in reversed(LOCKS):
        entries |= locked((CHECKOUT / lock).read_text(encoding="utf-8"))
    return "".join(entries[name] + "\n" for name in PACKAGES)


def without_other_libraries(wheel: Path) -> None:
    """Rewrite bitsandbytes' wheel with the libraries of KEPT_LIBRARIES alone; the rest stays byte for byte."""
    smaller = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            name = entry.filename.rsplit("/", 1)[-1]
            if name.startswith("libbitsandbytes_") and name not in KEPT_LIBRARIES:
                continue
            # The entry carries its own date: the same wheels give the same pack.
            target.writestr(entry, source.read(entry), zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def make(folder: Path = FOLDER) -> float:
    """Download the wheels into a new `folder`, in place of an earlier one; returns their size in MB.
    SystemExit where pip fails (its message stands above) or the pack is larger than it may be."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu-wheels-") as place:
        wheels = Path(place) / "wheels"
        listed = Path(place) / "requirements.txt"
        listed.write_text(requirements(), encoding="utf-8")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
            "--disable-pip-version-check", "--implementation=cp", f"--python-version={PYTHON}",
            *(f"--platform={platform}" for platform in PLATFORMS), f"--dest={wheels}", f"--requirement={listed}"]
        done = subprocess.run(command, timeout=DOWNLOAD_S, check=False)
        if done.returncode:
            raise SystemExit("the pack could not be made: pip's message stands above")
        for wheel in wheels.glob("bitsandbytes-*.whl"):
            without_other_libraries(wheel)
        found = {wheel.name.split("-")[0].replace("_", "-").lower() for wheel in wheels.glob("*.whl")}
        if missing := set(PACKAGES) - found:
            raise SystemExit(f"the pack could not be made: no wheel of {', '.join(sorted(missing))}")
        size_mb = sum(wheel.stat().st_size for wheel in wheels.glob("*.whl")) / 1e6
        if size_mb > LIMIT_MB:
            raise SystemExit(f"the pack has {size_mb:.1f} MB, more than the {LIMIT_MB} MB that it may have")
        shutil.rmtree(folder, ignore_errors=True)
        wheels.rename(folder)
    return size_mb
