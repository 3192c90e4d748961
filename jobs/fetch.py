"""`fetch`: bring a recipe's model and dataset from the Hub to where jobs look for them; and, before anything is queued,
the question whether they may be had. Light imports only."""

from __future__ import annotations

import argparse
import importlib.util
import signal
from collections.abc import Iterable
from pathlib import Path

from ftlib import atomic, hubapi, modelfiles, recipe
from ftlib.errors import DONE, InputError
from ftlib.spec import RunSpec
from ftlib.stop import StopFlag
from jobs import wish as wishes
from jobs.wish import Wish


def fetch(options: argparse.Namespace) -> int:
    """Download what the recipe needs of the Hub, in the foreground, with progress; Ctrl-C keeps what has arrived."""
    changes, cluster_changes = recipe.parse_set(options.set)
    profile = wishes.load_profile(options.cluster, cluster_changes)
    spec = recipe.load(wishes.RECIPES, options.model, changes)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError("make fetch needs the training packages, which are not installed here: run 'make setup'")
    from ftlib import download

    stop = StopFlag().install()
    signal.signal(signal.SIGINT, lambda *_: _interrupt(stop))
    cache = modelfiles.use_cache(profile.cache_dir(wishes.CHECKOUT))
    owner = "make fetch"
    name = _hub_model(spec)
    if name:
        model = download.fetch_model(name, spec.model.revision, cache=cache, owner=owner, stop=stop)
        folder = modelfiles.repository(cache, name) / "snapshots" / model.commit
        print(f"{name} at commit {model.commit[:12]} is at hand: {folder}")
    if spec.data.hub:
        data = download.fetch_dataset(spec.data.hub, spec.data.revision, cache=cache, owner=owner, stop=stop)
        print(f"{spec.data.hub} at commit {data.commit[:12]} is at hand, in {cache}")
    if not name and not spec.data.hub:
        print(f"Nothing to fetch: the model of {options.model} is the folder {spec.model.name}.")
    return DONE


def _interrupt(stop: StopFlag) -> None:
    stop.cause = stop.cause or "Ctrl-C; what has arrived is kept: run it again to continue"


def _hub_model(spec: RunSpec) -> str | None:
    """The model's name on the Hub; None for a folder."""
    path = Path(spec.model.name)
    return None if path.is_absolute() or (wishes.CHECKOUT / path).is_dir() else spec.model.name


def require_access(wanted: Iterable[Wish]) -> None:
    """Before anything is queued: see that what prepare will download may be read, and has room.

    InputError with all that the Hub refuses. What is at hand is not asked for; a Hub that this machine cannot reach is
    a note, because compute nodes may reach it.
    """
    problems: list[str] = []
    asked: set[tuple[str, str, str | None]] = set()
    for wish in wanted:
        model, data = wish.spec.model, wish.spec.data
        model_key = ("model", wish.model.path, model.revision)
        if not wish.model.at_hand and model_key not in asked:
            asked.add(model_key)
            problems += _model_problems(wish)
        data_key = ("dataset", data.hub or "", data.revision)
        if data.hub and wish.profile.compute_internet and data_key not in asked:
            asked.add(data_key)
            problems += _data_problems(data.hub, data.revision, wish.cache)
    if problems:
        raise InputError(problems)


def _model_problems(wish: Wish) -> list[str]:
    name, cache = wish.model.path, modelfiles.hub_folder(wish.cache)
    try:
        found = hubapi.look_up("model", name, wish.spec.model.revision)
        files = modelfiles.selected(found.files)
        size = sum(found.files[file] for file in files)
        atomic.require_space(cache, size, f"the files of {name}")
    except InputError as error:
        return error.messages
    except hubapi.Unreachable as error:
        _note(name, error)
        return []
    print(f"{name} is not at hand: the prepare job downloads {size / 1e9:.1f} GB into {cache}, before any GPU is held.")
    return []


def _data_problems(name: str, revision: str | None, cache: Path) -> list[str]:
    kept = modelfiles.repository(modelfiles.hub_folder(cache), name, kind="dataset")
    prepared = modelfiles.hf_home(cache) / "datasets" / name.replace("/", "___")
    if modelfiles.snapshots(kept, revision) or prepared.exists():
        return []
    try:
        hubapi.look_up("dataset", name, revision)
    except InputError as error:
        return error.messages
    except hubapi.Unreachable as error:
        _note(name, error)
    return []


def _note(name: str, error: hubapi.Unreachable) -> None:
    print(f"Note: {name} is not at hand, and whether it may be read could not be checked here: {error}. The prepare "
          "job tries it from its node.")  # fmt: skip
