"""Committed checkpoints: a folder with its manifest inside, taken for whole only when every byte verifies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from ftlib import atomic, sealing
from ftlib.sealing import Sealed
from ftlib.sealing import digest as digest  # of one file: what tests and reports compare

MANIFEST = "manifest.json"
PREFIX = "step-"
FORMAT = 2


def folder_for(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is committed."""
    return checkpoints / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint folder was saved after."""
    return int(folder.name.removeprefix(PREFIX))


def commit(temporary: Path, checkpoints: Path, *, run: str, step: int, sealed: Sealed | None = None) -> Path:
    """Give `temporary` its manifest and rename it into `checkpoints`. sealed: by those who wrote the files, else all
    are hashed here. A folder of that step which does not verify is replaced; one that does holds the same state, and is
    kept."""
    listed = dict(sorted((sealing.seal(temporary) if sealed is None else sealed).items()))
    atomic.write_json(temporary / MANIFEST, {"format": FORMAT, "run": run, "step": step, "files": listed})
    target = folder_for(checkpoints, step)
    if target.exists() and problems(target, run=run):
        atomic.discard_folder(target)
    atomic.commit_folder(temporary, target)
    return target


def problems(folder: Path, *, run: str) -> list[str]:
    """Why `folder` must not be resumed from, one line per reason; empty when every byte verifies."""
    try:
        manifest = sealing.manifest(folder / MANIFEST, FORMAT)
        owner, step = manifest.get("run"), manifest.get("step")
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the save was never finished"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = []
    if owner != run:
        found.append(f"belongs to run {owner!r}, not to {run!r}")
    if not folder.name.removeprefix(PREFIX).isdigit() or step != step_of(folder):
        found.append(f"its manifest is of step {step}")
    return found + sealing.damage(folder, manifest["files"], MANIFEST)


def committed(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    folders = [p for p in checkpoints.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def newest(checkpoints: Path, *, run: str) -> tuple[Path | None, dict[str, list[str]]]:
    """The newest checkpoint that verifies (None without one), and why each newer one was passed over."""
    rejected: dict[str, list[str]] = {}
    for folder in committed(checkpoints):
        why = problems(folder, run=run)
        if not why:
            return folder, rejected
        rejected[folder.name] = why
    return None, rejected


def prune(
    checkpoints: Path, *, run: str, keep: int = 2, best: int | None = None, every: int | None = None,
    verified: Collection[int] = (), delete: Callable[[Path], object] = shutil.rmtree,
) -> None:
    """Delete all but the newest `keep` that verify, what is newer than they, step `best`, and each `every`-th step.
    The newest was just committed. Steps in `verified` are not read once more, which would cost as much as the save.
    `delete` is given folders of a temporary name, so it may take its time."""
    whole = 1
    for folder in committed(checkpoints)[1:]:
        step = step_of(folder)
        if whole >= keep:
            if step != best and not (every and step % every == 0):
                doomed = atomic.temporary_beside(folder)
                os.rename(folder, doomed)
                delete(doomed)
        elif step in verified or not problems(folder, run=run):
            whole += 1
