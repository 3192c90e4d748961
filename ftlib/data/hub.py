"""Datasets on the hub: `check` on the login node (no import of datasets), `fetch` in the prepare stage."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ftlib import modelfiles
from ftlib.data import sources
from ftlib.errors import InputError
from ftlib.spec import DataSpec

# Bytes of the text that is trained on, of datasets in recipes: for the plan's estimates alone.
TEXT_BYTES = {"yahma/alpaca-cleaned": 40_000_000, "OpenAssistant/oasst1": 20_000_000}
# More bad rows than this share are no slips of a dataset's maker: the format is another.
TOLERATED = 0.02


def name(data: DataSpec) -> str:
    """The dataset in words: name, revision, split."""
    return f"{data.hub}{f'@{data.revision}' if data.revision else ''} ({data.split})"


def check(data: DataSpec, *, hf_home: Path, internet: bool) -> int | None:
    """See that compute nodes can get the dataset, from the hub or from the cache under `hf_home`; InputError if not.
    Returns the text's size in bytes where it is known."""
    repository = _repository(data, hf_home / "hub")
    if (repository / modelfiles.UNFINISHED).exists() and not internet:
        raise InputError(
            f"data.hub: {data.hub} is only in part in {repository}, and compute nodes here have no internet. "
            "'make fetch' with the same options continues it")
    prepared = hf_home / "datasets" / (data.hub or "").replace("/", "___")
    if not (internet or modelfiles.snapshots(repository, data.revision) or list(prepared.glob("*"))):
        raise InputError(
            f"data.hub: {data.hub} is not at hand and compute nodes here have no internet. Looked in "
            f"{repository}/snapshots and {prepared}. {_how_to_stage(data, hf_home)}")
    return TEXT_BYTES.get(data.hub or "")


def fetch(data: DataSpec) -> list[sources.Row]:
    """Every example of the dataset's split; a few rows that cannot be used (an empty output) are left out, and said.
    Raises InputError when the dataset cannot be had, or when too many of its rows are bad."""
    import datasets

    datasets.disable_progress_bars()
    assert data.hub is not None
    cache = modelfiles.hub_cache()
    # What 'hf download' leaves is a snapshot of files; datasets alone would not look there without a network.
    staged = reversed(modelfiles.snapshots(_repository(data, cache), data.revision))
    places = [(data.hub, data.revision), *((str(snapshot), None) for snapshot in staged)]
    found, errors = None, []
    for place, revision in places:
        try:
            found = datasets.load_dataset(place, split=data.split, revision=revision)
            break
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            errors.append(f"{place}: {' '.join(str(error).split())[:300]}")
    if found is None:
        raise InputError(
            f"data.hub: {name(data)} could not be loaded, in the cache {cache.parent}{modelfiles.network()}. "
            f"{'; '.join(errors)} {_how_to_stage(data, cache.parent)}")
    rows = ((f"row {number}", row) for number, row in enumerate(found, start=1))
    return list(sources.good_rows(rows, f"data.hub={name(data)}", data, tolerated=TOLERATED))


def digest(rows: Sequence[sources.Row]) -> str:
    """sha256 over the examples' content: what makes two fetches the same data."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _repository(data: DataSpec, cache: Path) -> Path:
    return cache / f"datasets--{(data.hub or '').replace('/', '--')}"


def _how_to_stage(data: DataSpec, home: Path) -> str:
    revision = f" --revision {data.revision}" if data.revision else ""
    return (
        "On a login or transfer node with a network, 'make fetch' with the same options (MODEL=, SET=) puts it where "
        f"jobs look for it. By hand: 'HF_HOME={home} hf download {data.hub}{revision} --repo-type dataset'"
        ", or download a .json or .jsonl file of it and say DATA=<that file>")
