"""Checksums of a checkpoint's files, taken while they are flushed and their pages are still in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftlib import atomic

# Blocks of one file are hashed side by side: hashlib lets go of the interpreter.
BLOCK_BYTES = 16 << 20
READ_BYTES = 1 << 20
# A growing file is sent to storage in portions of this size.
FLUSH_BYTES = 128 << 20
ALGORITHMS = ("sha256", "blake2b")
MOST_THREADS = 4

# What a manifest says of each file: {"bytes", "hash" (the algorithm), "digest"}, by its relative name.
Sealed = dict[str, dict[str, Any]]


@functools.cache
def fastest() -> str:
    """The faster algorithm on this machine: sha256 where the processor has instructions for it, else blake2b."""
    sample, taken = bytes(READ_BYTES), {}
    for name in ALGORITHMS:
        began = time.perf_counter()
        hashlib.new(name, sample)
        taken[name] = time.perf_counter() - began
    return min(taken, key=lambda name: taken[name])


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The checksum of a file, in hex: the hash of its blocks' hashes, so that it can be taken in parallel."""
    with ThreadPoolExecutor(_threads()) as pool:
        return _joined(_submit(pool, path, algorithm), algorithm)


class Stream:
    """A file that only grows: what is written is never changed, so it can be hashed and flushed at once."""

    def __init__(self, file: io.FileIO, hash_next: Callable[[], object], flush_now: Callable[[], object]) -> None:
        self._file, self._size, self._hash_next, self._flush_now = file, 0, hash_next, flush_now

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`; what torch.save asks for."""
        view = left = memoryview(data).cast("B")
        while left:
            before, count = self._size, self._file.write(left[:BLOCK_BYTES])
            self._size, left = before + count, left[count:]
            if self._size // BLOCK_BYTES > before // BLOCK_BYTES:
                self._hash_next()
            if self._size // FLUSH_BYTES > before // FLUSH_BYTES:
                self._flush_now()
        return len(view)

    def flush(self) -> None:
        """Nothing is held back here."""


class Sealer:
    """Flushes and hashes a folder's files beside the one who writes them: `stream()` for a large file, while it grows;
    `take()` after others that are complete; `finish()` at the end, which raises what a flush raised (OSError)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.algorithm = folder, fastest()
        # One more than hash: a thread that waits for storage does not compute.
        self._pool = ThreadPoolExecutor(_threads() + 1)
        self._hashes: dict[str, list[Future[bytes]]] = {}
        self._flushes: list[Future[None]] = []

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Stream]:
        """A new file to append to, under its name in the folder."""
        path = self._folder / name
        blocks: list[Future[bytes]] = []
        self._hashes[name] = blocks

        def hash_next() -> None:
            blocks.append(self._pool.submit(_block, path, len(blocks) * BLOCK_BYTES, self.algorithm))

        with path.open("wb", buffering=0) as file:
            yield Stream(file, hash_next, lambda: self._flush(path))
            if file.tell() > len(blocks) * BLOCK_BYTES or not blocks:
                hash_next()
        self._flush(path)

    def _flush(self, path: Path) -> None:
        self._flushes.append(self._pool.submit(atomic.fsync, path))

    def take(self) -> None:
        """Begin with every file that is new in the folder; none of them may change any more."""
        for path in sorted(self._folder.rglob("*")):
            name = str(path.relative_to(self._folder))
            if name not in self._hashes and path.is_file():
                self._flush(path)
                self._hashes[name] = _submit(self._pool, path, self.algorithm)

    def finish(self) -> Sealed:
        """Size and checksum of every file, all of them on storage."""
        self.take()
        for flushed in self._flushes:
            flushed.result()
        found: Sealed = {}
        for name, blocks in self._hashes.items():
            size = (self._folder / name).stat().st_size
            found[name] = {"bytes": size, "hash": self.algorithm, "digest": _joined(blocks, self.algorithm)}
        return found

    def __enter__(self) -> Sealer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def seal(folder: Path) -> Sealed:
    """Flush and hash every file of a folder."""
    with Sealer(folder) as sealer:
        return sealer.finish()


def damage(folder: Path, listed: Sealed, beside: str) -> list[str]:
    """How a folder differs from what its manifest lists, a line per file; `beside` is the manifest's own name."""
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {beside}
    found = [f"{name} is not in the manifest" for name in sorted(present - set(listed))]
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = {
            name: _submit(pool, folder / name, file["hash"])
            for name, file in listed.items()
            if name in present and (folder / name).stat().st_size == file["bytes"]
        }
        for name, file in sorted(listed.items()):
            if name not in present:
                found.append(f"{name} is missing")
            elif name not in hashes:
                found.append(f"{name} has {(folder / name).stat().st_size} bytes, not {file['bytes']}")
            elif _joined(hashes[name], file["hash"]) != file["digest"]:
                found.append(f"{name} does not match its checksum")
    return found


def manifest(path: Path, form: int) -> dict[str, Any]:
    """A manifest, its "files" as `Sealed`. Raises OSError; ValueError where it is not of this form."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != form:
            raise ValueError(f"format {found['format']!r}; this code reads {form}")
        for name, file in found["files"].items():
            if file["hash"] not in ALGORITHMS or ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"{name!r} with checksum {file['hash']!r}")
            if not {"bytes", "digest"} <= file.keys():
                raise ValueError(f"{name!r} without size or digest")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return found


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _submit(pool: ThreadPoolExecutor, path: Path, algorithm: str) -> list[Future[bytes]]:
    starts = range(0, max(1, path.stat().st_size), BLOCK_BYTES)
    return [pool.submit(_block, path, start, algorithm) for start in starts]


def _joined(blocks: list[Future[bytes]], algorithm: str) -> str:
    return hashlib.new(algorithm, b"".join(block.result() for block in blocks)).hexdigest()


def _block(path: Path, start: int, algorithm: str) -> bytes:
    state, buffer = hashlib.new(algorithm), memoryview(bytearray(READ_BYTES))
    left = BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, READ_BYTES)])):
            state.update(buffer[:count])
            left -= count
    return state.digest()
