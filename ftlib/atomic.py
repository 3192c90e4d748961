"""Writing that is whole or not there: temporary beside the target, fsync, one rename."""

import contextlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from ftlib.errors import InputError

TEMPORARY = ".tmp-"


def temporary_beside(target: Path) -> Path:
    """A name next to `target` that no reader takes for something finished."""
    return target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}")


def _write_synced(path: Path, text: str, mode: Literal["w", "x"]) -> None:
    """Write `text` and flush it to storage. FileExistsError with mode "x" where `path` is there."""
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_text(target: Path, text: str) -> None:
    """Put `text` at `target`; a reader sees the old content or the new, never a part."""
    temporary = temporary_beside(target)
    try:
        _write_synced(temporary, text, "w")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(target.parent)


def create_text(target: Path, text: str, *, durable: bool = True) -> bool:
    """`write_text`, unless something is at `target` already; whether it is ours that is there now.

    durable: it must survive a crash of the machine. Without, it is whole or not there, still.
    """
    temporary = temporary_beside(target)
    try:
        _write_synced(temporary, text, "w")
        try:
            os.link(temporary, target)
        except FileExistsError:
            # Over NFS a call may succeed and say this, when its first answer was lost.
            return temporary.stat().st_nlink == 2
        except OSError:  # a file system without hard links
            try:
                _write_synced(target, text, "x")
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        fsync(target.parent)
    return True


def write_json(target: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(target, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fsync(path: Path | str) -> None:
    """Flush a file to storage, or a folder, so that the renames in it survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to storage. An empty folder is an entry of its parent, no more."""
    for root, folders, files in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in files), *([root] if files or folders else [])]:
            fsync(path)


def commit_folder(temporary: Path, target: Path) -> bool:
    """Flush `temporary` and rename it to `target`. False, and `temporary` is gone, when `target` is there already."""
    fsync_tree(temporary)
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        return False
    fsync(target.parent)
    return True


def discard_folder(folder: Path) -> None:
    """Delete a committed folder; killed half-way, what remains has a temporary name."""
    doomed = temporary_beside(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep_temporaries(folder: Path, *, still_s: float = 0) -> None:
    """Delete what killed writers left in `folder`; where others may be writing, only what was still for so long."""
    for left in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if not still_s or time.time() - left.stat().st_mtime > still_s:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def require_space(folder: Path, need_bytes: int, purpose: str) -> None:
    """InputError when the storage under `folder` has less than `need_bytes` free."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < need_bytes:
        raise InputError(
            f"no space left for {purpose}: {need_bytes / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free at "
            f"{there}. Free some, or use another folder, and submit again; nothing is lost")
