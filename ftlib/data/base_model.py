"""Loading a base model: a load that fails becomes words that say what was looked for, where, and how to stage it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftlib.errors import InputError

# One file of each group must be there.
TOKENIZER = (("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",))
WEIGHTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@contextmanager
def loading(model: str, needed: tuple[tuple[str, ...], ...], revision: str | None = None) -> Iterator[None]:
    """Load tokenizer or weights of `model` (a folder or a hub name) inside this context.

    Raises InputError when a folder lacks the `needed` files (TOKENIZER, WEIGHTS or both), or when the load itself
    cannot get or read them: gated, no network, damaged.
    """
    folder = Path(model)
    local = folder.is_absolute() or folder.exists()
    if local and (missing := missing_files(folder, needed)):
        looked = f"lacks {' and '.join(missing)}" if folder.is_dir() else "is no folder"
        raise InputError(f"model.name: {folder} {looked}. {_how_to_stage('<name on the hub>', folder)}")
    try:
        yield
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())[:400]
        if local:
            raise InputError(f"model.name: the files in {folder} cannot be loaded: {found}") from error
        raise InputError(
            f"model.name: {model}{f' (revision {revision})' if revision else ''} could not be loaded. Looked for "
            f"{' and '.join(map(' or '.join, needed))} in the cache {hub_cache()}{network()}. {found} "
            + _how_to_stage(model, Path("/path/to", folder.name))
        ) from error


def missing_files(folder: Path, needed: tuple[tuple[str, ...], ...]) -> list[str]:
    """The groups of `needed` of which `folder` holds no file, each in words."""
    return [" or ".join(group) for group in needed if not any((folder / name).is_file() for name in group)]


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def network() -> str:
    """The words for whether the network was tried, too."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    return "; the network was not tried (HF_HUB_OFFLINE is set)" if offline else " and on the hub"


def _how_to_stage(name: str, folder: Path) -> str:
    return (
        f"To stage the model: where there is a network, 'hf download {name} --local-dir {folder}' (for a gated model "
        f"accept its licence on its page and 'hf auth login' first), then submit with SET=\"model.name={folder}\""
    )
