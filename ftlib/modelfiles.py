"""Where a base model's files are (a folder or the hub's cache), which a run needs, and why a load fails. No torch."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import hubapi
from ftlib.errors import InputError, nearest
from ftlib.plan.shapes import KNOWN

# One file of each group must be there.
TOKENIZER = (("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",))
WEIGHTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"))
# The weights that transformers would load: the first of these that is there. An index names its shards.
SINGLE_SAFETENSORS, SAFETENSORS_INDEX, SINGLE_BIN, BIN_INDEX = WEIGHTS[1]
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
# What else a run reads: configurations, vocabularies, chat templates. Only of the repository's root: folders below it
# hold the same weights in other forms (original/, onnx/).
_SMALL_FILE = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja")
MAIN = "main"
# In a dataset's folder of the hub cache while not all of its files are there.
UNFINISHED = "ftlib-unfinished"


@dataclass(frozen=True)
class ModelFiles:
    """What a name stands for."""

    path: str  # an absolute folder, or the hub's name where the files are in the hub's cache, or fetched by prepare
    config: dict[str, Any]  # its config.json
    at_hand: bool = True  # all files are there; otherwise prepare fetches them


def hf_home(cache: Path) -> Path:
    """Where the hub's files are kept: the person's HF_HOME, else inside the project's cache."""
    return Path(os.environ["HF_HOME"]) if os.environ.get("HF_HOME") else cache / "huggingface"


def hub_folder(cache: Path) -> Path:
    """The hub cache that jobs use: the person's HF_HUB_CACHE, else hub/ in HF_HOME."""
    return Path(os.environ["HF_HUB_CACHE"]) if os.environ.get("HF_HUB_CACHE") else hf_home(cache) / "hub"


def snapshots(repository: Path, revision: str | None) -> list[Path]:
    """What a hub cache holds of a model or dataset: the wanted revision, or all where none is said; oldest first."""
    ref = repository / "refs" / (revision or "")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    found = [path for path in (repository / "snapshots").glob("*") if commit in (None, path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def repository(cache: Path, name: str, *, kind: str = "model") -> Path:
    """The folder of a model (or dataset) in the hub cache `cache`."""
    return cache / f"{kind}s--{name.replace('/', '--')}"


def snapshot(cache: Path, name: str, revision: str | None) -> Path | None:
    """The folder with a cached model's files at `revision` (default: main); None where it was never fetched."""
    folder = repository(cache, name)
    reference = folder / "refs" / (revision or MAIN)
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    found = folder / "snapshots" / commit if commit else None
    return found if found and found.is_dir() else None


def selected(files: Iterable[str]) -> list[str]:
    """The files of a repository that a run needs: configurations, tokenizer, and the weights in one form alone."""
    there = list(files)
    small = [name for name in there if _SMALL_FILE.fullmatch(name) and not name.endswith(".index.json")]
    weights: list[str] = []
    if (form := next((name for name in WEIGHTS[1] if name in there), None)) is not None:
        weights = [form]
        if form.endswith(".index.json"):
            ending = ".safetensors" if form == SAFETENSORS_INDEX else ".bin"
            weights += [name for name in there if _SHARD.fullmatch(name) and name.endswith(ending)]
    return sorted(small) + weights


def missing(folder: Path, needed: tuple[tuple[str, ...], ...] = ()) -> list[str]:
    """What a folder lacks of `needed` (default: tokenizer and weights), the shards that its index names included."""
    needed = needed or (*TOKENIZER, *WEIGHTS)
    lacking = [" or ".join(group) for group in needed if not any((folder / name).is_file() for name in group)]
    if WEIGHTS[1] in needed:
        form = next((name for name in WEIGHTS[1] if (folder / name).is_file()), "")
        if form.endswith(".index.json"):
            try:
                index = json.loads((folder / form).read_text(encoding="utf-8"))
                shards = sorted(set(index["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return [*lacking, f"a readable {form}"]
            lacking += [name for name in shards if not (folder / name).is_file()]
    return lacking


def locate(name: str, revision: str | None, *, checkout: Path, cache: Path, internet: bool) -> ModelFiles:
    """The files of `model.name`: a folder in the checkout or anywhere, a hub model in the cache, or one to be fetched.
    Raises InputError that says which places were looked at and how to stage a model."""
    folder = checkout / name
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"model.name: {folder} has no config.json; expected a model as transformers saves it")
        return ModelFiles(str(folder.resolve()), _read(folder / "config.json"))
    hub = hub_folder(cache)
    folder_in_cache = snapshot(hub, name, revision)
    at_hand = folder_in_cache is not None and not missing(folder_in_cache)
    # Where another revision can be fetched, any tells the shape.
    cached = [path / "config.json" for path in snapshots(repository(hub, name), None if internet else revision)]
    if cached := [path for path in cached if path.exists()]:
        if not at_hand and not internet:
            raise InputError(
                f"model.name: {name} is only in part at hand, and compute nodes here have no internet: "
                f"{cached[-1].parent} lacks {_listed(missing(cached[-1].parent))}. {how_to_fetch(name, revision)}")
        return ModelFiles(name, _read(cached[-1]), at_hand)
    if name in KNOWN and internet:
        return ModelFiles(name, KNOWN[name], at_hand=False)
    hub_says = ""
    if internet and name.count("/") == 1 and not (checkout / name.partition("/")[0]).exists():
        try:
            return ModelFiles(name, hubapi.read_json("model", name, revision, "config.json"), at_hand=False)
        except hubapi.Unreachable as error:
            hub_says = f" {error}."
    known = [*sorted(f"models/{path.name}" for path in (checkout / "models").glob("*") if path.is_dir()), *KNOWN]
    why = "compute nodes here have no internet" if name in KNOWN else "its shape is not known without its config.json"
    raise InputError(
        f"model.name: {name!r} is not at hand ({why}). Looked for {folder}/config.json and "
        f"{repository(hub, name)}/snapshots/{(not internet and revision) or '*'}/config.json."
        f"{hub_says}{nearest(name, known)} " + how_to_fetch(name, revision))


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
    if local and (lacking := missing(folder, needed)):
        looked = f"lacks {_listed(lacking)}" if folder.is_dir() else "is no folder"
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
        in_cache = snapshot(hub_cache(), model, revision)
        lacking = missing(in_cache, needed) if in_cache else list(map(" or ".join, needed))
        where = in_cache or f"the cache {hub_cache()}"
        raise InputError(
            f"model.name: {model}{f' (revision {revision})' if revision else ''} could not be loaded. Looked for "
            f"{_listed(lacking) if lacking else 'its files'} in {where}{network()}. {found} "
            + how_to_fetch(model, revision)) from error


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


def how_to_fetch(name: str, revision: str | None) -> str:
    """What brings a hub model where jobs look for it, from this machine or from another one."""
    at = f" SET=model.revision={revision}" if revision else ""
    return (
        f"On a login or transfer node with a network, 'make fetch MODEL=<recipe>{at}' puts it where jobs look for it, "
        "and then the same command again (make resume RUN=… for a run that is there). "
        + _how_to_stage(name, Path("/path/to", name.rpartition("/")[2])))


def _listed(names: list[str]) -> str:
    """Names for a message: all of a few, the first of many."""
    return " and ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more files"


def use_cache(cache: Path) -> Path:
    """Let this process, and those that it starts, keep hub files where jobs look for them; returns the hub cache."""
    home = hf_home(cache)
    token = hubapi.token_file()
    os.environ["HF_HOME"] = str(home)
    os.environ["HF_TOKEN_PATH"] = str(token)  # a login's token stays where it is
    return hub_folder(cache)


def _how_to_stage(name: str, folder: Path) -> str:
    return (
        f"To bring the files yourself: where there is a network, 'hf download {name} --local-dir {folder}' (for a "
        "gated model accept its license on its page and 'hf auth login' first), then submit with "
        f"SET=\"model.name={folder}\"")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(value, dict)
    except (OSError, ValueError, AssertionError):
        raise InputError(f"model.name: {path} is no JSON object") from None
    return value
