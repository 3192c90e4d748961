"""The pack on a machine without a network: unpacked, and first on the path of the checks' processes. No pip."""

from __future__ import annotations

import os
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from benchmarks.gpu_check.pack import CHECKOUT, FOLDER, PYTHON


def lacking(folder: Path = FOLDER) -> list[str]:
    """The packages of the pack that this Python has not, or in another version. A virtual environment may be a bare
    machine's own, so what it holds is compared, not where it lies."""
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            same = metadata.version(name) == version
        except metadata.PackageNotFoundError:
            same = False
        if not same:
            found.append(name)
    return found


def fits(folder: Path = FOLDER) -> str:
    """Why the pack cannot be used by this Python; empty where it can."""
    if not any(folder.glob("*.whl")):
        return f"there is no pack in {folder} (make gpu-check ARGS=--pack, where there is a network)"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != PYTHON:
        return f"the pack is for Python {PYTHON}, this is {version}"
    return ""


def unpack(site: Path, folder: Path = FOLDER) -> list[str]:
    """Unpack the wheels of `folder` into `site`; returns their names. A wheel is a zip file of what is imported."""
    names = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        names.append(wheel.name)
    return names


def environment(site: Path | None) -> dict[str, str]:
    """The environment of the checks' processes: the pack before all else, nothing of ~/.local, no network, one GPU."""
    variables = {**os.environ, "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    variables["WANDB_MODE"] = "disabled"
    variables["TOKENIZERS_PARALLELISM"] = "false"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    variables["CUDA_VISIBLE_DEVICES"] = "0" if visible is None else visible.split(",")[0]
    variables["PYTHONPATH"] = os.pathsep.join([*([str(site)] if site else []), str(CHECKOUT)])
    return variables
