"""Where a base model's files are: a folder, or the hub's cache. Nothing is loaded or fetched here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.errors import InputError, nearest
from ftlib.plan.shapes import KNOWN


@dataclass(frozen=True)
class ModelFiles:
    """What a name stands for."""

    path: str  # an absolute folder, or the hub's name where the files are fetched when first used
    config: dict[str, Any]  # its config.json


def hf_home(cache: Path) -> Path:
    """Where the hub's files are kept: the person's HF_HOME, else inside the project's cache."""
    return Path(os.environ["HF_HOME"]) if os.environ.get("HF_HOME") else cache / "huggingface"


def locate(name: str, revision: str | None, *, checkout: Path, cache: Path, internet: bool) -> ModelFiles:
    """The files of `model.name`: a folder in the checkout or anywhere, a hub model in the cache, or one to be fetched.

    Raises InputError that says which places were looked at and how to stage a model.
    """
    folder = checkout / name
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"model.name: {folder} has no config.json; expected a model as transformers saves it")
        return ModelFiles(str(folder.resolve()), _read(folder / "config.json"))
    snapshots = hf_home(cache) / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    cached = sorted(snapshots.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if cached:
        return ModelFiles(name, _read(cached[-1]))
    if name in KNOWN and internet:
        return ModelFiles(name, KNOWN[name])
    local = sorted(f"models/{path.name}" for path in (checkout / "models").glob("*") if path.is_dir())
    known = [*local, *KNOWN]
    stage = (
        f"Stage it where there is internet: hf download {name} --local-dir <folder on shared storage>, "
        'then say SET="model.name=<that folder>"'
    )
    why = "compute nodes here have no internet" if name in KNOWN else "its shape is not known without its config.json"
    raise InputError(
        f"model.name: {name!r} is not at hand ({why}). Looked for {folder}/config.json and {snapshots}/*/config.json."
        f"{nearest(name, known)} {stage}"
    )


def start(said: str, *, runs: Path, checkout: Path) -> tuple[ModelFiles | None, Path | None]:
    """What `model.init_from` stands for: merged weights (they are the base then), else the folder of an adapter.

    A run's name or a folder. Raises InputError that says what was looked for, with the nearest run.
    """
    run, folder = runs / said, (checkout / said).resolve()
    for place in (run / "export" / "merged", run / "export" / "adapter", folder, folder / "merged", folder / "adapter"):
        if (place / "adapter_config.json").exists():
            return None, place
        if (place / "config.json").exists():
            return ModelFiles(str(place), _read(place / "config.json")), None
    known = [path.parent.name for path in runs.glob("*/export")]
    raise InputError(
        f"model.init_from: {said!r} is no finished run and no folder with config.json or adapter_config.json. Looked "
        f"in {run}/export and {folder}.{nearest(said, known)}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(value, dict)
    except (OSError, ValueError, AssertionError):
        raise InputError(f"model.name: {path} is no JSON object") from None
    return value
