"""Where a base model's files are: a folder, or the hub's cache; and words for a load that fails. No torch."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.errors import InputError, nearest
from ftlib.plan.shapes import KNOWN

# One file of each group must be there.
TOKENIZER = (("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",))
WEIGHTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"))


@dataclass(frozen=True)
class ModelFiles:
    """What a name stands for."""

    path: str  # an absolute folder, or the hub's name where the files are fetched when first used
    config: dict[str, Any]  # its config.json


def hf_home(cache: Path) -> Path:
    """Where the hub's files are kept: the person's HF_HOME, else inside the project's cache."""
    return Path(os.environ["HF_HOME"]) if os.environ.get("HF_HOME") else cache / "huggingface"


def snapshots(repository: Path, revision: str | None) -> list[Path]:
    """What a hub cache holds of a model or dataset: the wanted revision, or all where none is said; oldest first."""
    ref = repository / "refs" / (revision or "")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    found = [path for path in (repository / "snapshots").glob("*") if commit in (None, path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def locate(name: str, revision: str | None, *, checkout: Path, cache: Path, internet: bool) -> ModelFiles:
    """The files of `model.name`: a folder in the checkout or anywhere, a hub model in the cache, or one to be fetched.
    Raises InputError that says which places were looked at and how to stage a model."""
    folder = checkout / name
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"model.name: {folder} has no config.json; expected a model as transformers saves it")
        return ModelFiles(str(folder.resolve()), _read(folder / "config.json"))
    repository = hf_home(cache) / "hub" / f"models--{name.replace('/', '--')}"
    # Where another revision can be fetched, any tells the shape.
    cached = [path / "config.json" for path in snapshots(repository, None if internet else revision)]
    if cached := [path for path in cached if path.exists()]:
        return ModelFiles(name, _read(cached[-1]))
    if name in KNOWN and internet:
        return ModelFiles(name, KNOWN[name])
    known = [*sorted(f"models/{path.name}" for path in (checkout / "models").glob("*") if path.is_dir()), *KNOWN]
    why = "compute nodes here have no internet" if name in KNOWN else "its shape is not known without its config.json"
    raise InputError(
        f"model.name: {name!r} is not at hand ({why}). Looked for {folder}/config.json and {repository}/snapshots/"
        f"{(not internet and revision) or '*'}/config.json.{nearest(name, known)} "
        + _how_to_stage(name, Path("/path/to", folder.name)))


def start(said: str, *, runs: Path, checkout: Path) -> tuple[ModelFiles | None, Path | None]:
    """What `model.init_from` (a run's name or a folder) stands for: merged weights, the base then, else an adapter's
    folder. Raises InputError that says what was looked for, with the nearest run."""
    run, folder = runs / said, (checkout / said).resolve()
    for place in (run / "export" / "merged", run / "export" / "adapter", folder, folder / "merged", folder / "adapter"):
        if (place / "adapter_config.json").exists():
            return None, place
        if (place / "config.json").exists():
            return ModelFiles(str(place), _read(place / "config.json")), None
    known = [path.parent.name for path in runs.glob("*/export")]
    raise InputError(
        f"model.init_from: {said!r} is no finished run and no folder with config.json or adapter_config.json. Looked "
        f"in {run}/export and {folder}.{nearest(said, known)}")


@contextmanager
def loading(model: str, needed: tuple[tuple[str, ...], ...], revision: str | None = None) -> Iterator[None]:
    """Load tokenizer or weights of `model` (a folder or a hub name) inside this context.
    InputError: a folder lacks the `needed` files (TOKENIZER, WEIGHTS or both), they cannot be fetched or read, or they
    cannot be loaded without running Python code of the model's own."""
    folder = Path(model)
    local = folder.is_absolute() or folder.exists()
    missing = [" or ".join(group) for group in needed if not any((folder / name).is_file() for name in group)]
    if local and missing:
        looked = f"lacks {' and '.join(missing)}" if folder.is_dir() else "is no folder"
        raise InputError(f"model.name: {folder} {looked}. {_how_to_stage('<name on the hub>', folder)}")
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"model.name: the weights of {model} hold Python objects besides tensors, which are never loaded here. "
            "Allowed: *.safetensors, or *.bin with tensors alone") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(_needs_own_code(model)) from error
        found = " ".join(str(error).split())[:400]
        if local:
            raise InputError(f"model.name: the files in {folder} cannot be loaded: {found}") from error
        raise InputError(
            f"model.name: {model}{f' (revision {revision})' if revision else ''} could not be loaded. Looked for "
            f"{' and '.join(map(' or '.join, needed))} in the cache {hub_cache()}{network()}. {found} "
            + _how_to_stage(model, Path("/path/to", folder.name))) from error


def _needs_own_code(model: str) -> str:
    return (
        f"model.name: {model} cannot be loaded without Python code that comes with it ('auto_map' in its config.json "
        "or tokenizer_config.json), and such code is never run here. Allowed: models whose architecture and tokenizer "
        "are part of transformers, such as the Llama, Mistral, Qwen and Falcon families")


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def network() -> str:
    """The words for whether the network was tried, too."""
    from huggingface_hub import constants

    return "; the network was not tried (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else " and on the hub"


def _how_to_stage(name: str, folder: Path) -> str:
    return (
        f"To stage the model: where there is a network, 'hf download {name} --local-dir {folder}' (for a gated model "
        f"accept its licence on its page and 'hf auth login' first), then submit with SET=\"model.name={folder}\"")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(value, dict)
    except (OSError, ValueError, AssertionError):
        raise InputError(f"model.name: {path} is no JSON object") from None
    return value
