"""Committed checkpoints: a folder with its manifest inside, taken for whole only when every byte verifies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ftlib import atomic

MANIFEST = "manifest.json"
PREFIX = "step-"


def digest(path: Path) -> str:
    """blake2b of a file, in hex: fast, and no two contents share it."""
    state = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def folder_for(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is committed."""
    return checkpoints / f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint folder was saved after."""
    return int(folder.name.removeprefix(PREFIX))


def commit(temporary: Path, checkpoints: Path, *, run: str, step: int) -> Path:
    """Seal `temporary` with a manifest and rename it into `checkpoints`.

    A folder of that step which does not verify is replaced; one that does is kept, for it holds the same state.
    """
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    listed = {str(f.relative_to(temporary)): {"bytes": f.stat().st_size, "blake2b": digest(f)} for f in files}
    atomic.write_json(temporary / MANIFEST, {"format": 1, "run": run, "step": step, "files": listed})
    target = folder_for(checkpoints, step)
    if target.exists() and problems(target, run=run):
        atomic.discard_folder(target)
    atomic.commit_folder(temporary, target)
    return target


def problems(folder: Path, *, run: str) -> list[str]:
    """Why `folder` must not be resumed from, one line per reason; empty when every byte verifies."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["blake2b"]) for name, entry in manifest["files"].items()}
        owner, step = manifest["run"], manifest["step"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the save was never finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = []
    if owner != run:
        found.append(f"belongs to run {owner!r}, not to {run!r}")
    if not folder.name.removeprefix(PREFIX).isdigit() or step != step_of(folder):
        found.append(f"its manifest is of step {step}")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    found += [f"{name} is not in the manifest" for name in sorted(present - set(files))]
    for name, (size, checksum) in sorted(files.items()):
        path = folder / name
        if name not in present:
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        elif digest(path) != checksum:
            found.append(f"{name} does not match its checksum")
    return found


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


def prune(checkpoints: Path, *, run: str, keep: int = 2) -> None:
    """Keep the newest `keep` that verify, and what is newer than they; the caller has just committed the newest."""
    whole = 1
    for folder in committed(checkpoints)[1:]:
        if whole >= keep:
            atomic.discard_folder(folder)
        elif not problems(folder, run=run):
            whole += 1
