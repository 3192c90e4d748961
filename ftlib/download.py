"""Bring a hub model's files into the cache that all nodes see: once, resumable, with progress. No torch.

The prepare stage calls it in a CPU job, and `make fetch` on a login or transfer node, so that no job ever downloads
while it holds a GPU. The commit that the revision stands for is found first; every later stage of the run uses it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib import atomic, hubapi, hubget, modelfiles
from ftlib.errors import FtError, InputError
from ftlib.lease import Lease
from ftlib.stop import StopFlag

POLL_S = 0.2
REPORT_S = 10.0
# Of a large file, what has arrived counts as progress in pieces of this size.
PIECE_BYTES = 2 * 2**30
# Waits before a new try while the Hub cannot be reached or a connection breaks without a byte having come; a try that
# brought bytes begins the list anew.
RETRY_WAITS_S = (2.0, 10.0, 30.0, 60.0)
END_S = 3.0
GB = 1e9


@dataclass(frozen=True)
class Fetched:
    """A model in the cache."""

    commit: str
    downloaded_bytes: int


def fetch_dataset(name: str, revision: str | None, *, cache: Path, owner: str, stop: StopFlag) -> Fetched:
    """See that the hub cache `cache` holds all files of a dataset. Raises what `fetch_model` does."""
    found = hubapi.look_up("dataset", name, revision)
    folder = modelfiles.repository(cache, name, kind="dataset")
    with _leased(folder, owner, name, stop) as lease:
        # Nothing in the files themselves tells that some are still to come.
        unfinished = folder / modelfiles.UNFINISHED
        unfinished.touch()
        work = _Download(name, found, cache, stop, lease, lambda piece: None, kind="dataset")
        work.get(list(found.files))
        unfinished.unlink()
    _point_to(folder, revision, found.commit)
    return Fetched(found.commit, work.downloaded)


def fetch_model(
    name: str, revision: str | None, *, cache: Path, owner: str, stop: StopFlag,
    committed: Callable[[str], None] = lambda piece: None,
) -> Fetched:  # fmt: skip
    """See that the hub cache `cache` holds all files of a model that a run needs, and say of which commit.

    owner: who it works for, one line (the run); committed: called with a description after each piece that stays.
    InputError: no access, no such name or revision, files that are missing, no space. Interrupted: asked to stop; what
    has arrived stays. FtError: the network failed for minutes.
    """
    found = _resolve(name, revision, cache, stop)
    if isinstance(found, str):
        return Fetched(found, 0)
    wanted = modelfiles.selected(found.files)
    folder = modelfiles.repository(cache, name) / "snapshots" / found.commit
    if all((folder / file).is_file() for file in wanted) and not modelfiles.missing(folder):
        _point_to(modelfiles.repository(cache, name), revision, found.commit)
        return Fetched(found.commit, 0)
    with _leased(modelfiles.repository(cache, name), owner, name, stop) as lease:
        work = _Download(name, found, cache, stop, lease, committed)
        work.get(wanted)
        # Shards whose names are not the usual ones stand in the index alone.
        if further := [file for file in modelfiles.missing(folder) if file in found.files]:
            work.get(further)
    if lacking := modelfiles.missing(folder):
        raise InputError(
            f"model.name: {name} at commit {found.commit[:12]} has no {' and no '.join(lacking)} on "
            f"{hubapi.endpoint()}; expected a model as transformers saves it")
    _point_to(modelfiles.repository(cache, name), revision, found.commit)
    return Fetched(found.commit, work.downloaded)


def _resolve(name: str, revision: str | None, cache: Path, stop: StopFlag) -> hubapi.Repository | str:
    """The repository as the Hub describes it; or the commit of complete cached files where it does not answer or
    refuses."""
    cached = modelfiles.snapshot(cache, name, revision)
    complete = cached is not None and not modelfiles.missing(cached)
    waits = list(RETRY_WAITS_S) if not complete else []
    while True:
        try:
            return hubapi.look_up("model", name, revision)
        except (hubapi.Unreachable, InputError) as error:
            if complete and cached is not None:
                print(f"model: {'; '.join(error.messages)}", flush=True)
                print(f"model: the files in {cached} are complete and are used", flush=True)
                return cached.name
            if isinstance(error, InputError):
                raise
            if "HF_HUB_OFFLINE" in str(error):
                lacking = modelfiles.missing(cached) if cached else ["all of it"]
                raise InputError(
                    f"model.name: {name} is not at hand: {modelfiles.repository(cache, name)} lacks "
                    f"{', '.join(lacking[:4])}; {error}. {modelfiles.how_to_fetch(name, revision)}") from None
            if not waits:
                # Worded as a network failure, which is tried again later.
                raise FtError(f"Service Unavailable: {error}. {modelfiles.how_to_fetch(name, revision)}") from None
            print(f"model: {error}; next try in {waits[0]:.0f} s", flush=True)
            _pause(waits.pop(0), stop)


def _pause(seconds: float, stop: StopFlag) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stop.check()
        time.sleep(POLL_S)


@contextlib.contextmanager
def _leased(folder: Path, owner: str, name: str, stop: StopFlag) -> Iterator[Lease]:
    """Be the only process of all nodes that downloads into `folder`; waits for another."""
    lease = Lease(folder, owner)
    reported_at = -REPORT_S * 6
    while (holder := lease.acquire()) is not None:
        stop.check()
        if time.monotonic() - reported_at >= REPORT_S * 6:
            reported_at = time.monotonic()
            print(f"model: {name} is being downloaded by {holder}; waiting for it", flush=True)
        time.sleep(1)
    try:
        yield lease
    finally:
        lease.release()


class _Download:
    """The download of one model, in a process of its own, which can be ended in the middle of a read."""

    def __init__(
        self, name: str, repository: hubapi.Repository, cache: Path, stop: StopFlag, lease: Lease,
        committed: Callable[[str], None], kind: hubapi.Kind = "model",
    ) -> None:  # fmt: skip
        self.downloaded = 0
        self._name = name
        self._kind = kind
        self._repository = repository
        self._cache = cache
        self._folder = modelfiles.repository(cache, name, kind=kind)
        self._snapshot = self._folder / "snapshots" / repository.commit
        self._stop = stop
        self._lease = lease
        self._committed = committed

    def get(self, wanted: list[str]) -> None:
        """Download what is missing of `wanted`."""
        begun_with = self._arrived(wanted)
        waits = list(RETRY_WAITS_S)
        while left := [file for file in wanted if not (self._snapshot / file).is_file()]:
            before = self._arrived(wanted)
            total = sum(self._repository.files[file] for file in wanted)
            atomic.require_space(self._cache, total - before, f"the files of {self._name}")
            code, reason = self._run(left, wanted, total)
            if code:
                self._stop.check()
            if code == 0 and any((self._snapshot / file).is_file() for file in left):
                continue
            if code == 64:
                field = "model.name" if self._kind == "model" else "data.hub"
                raise InputError(f"{field}: {self._name} cannot be downloaded: {reason}")
            if code not in (69, -9, -15):
                raise FtError(f"the download of {self._name} failed: {reason or f'exit code {code}'}")
            if self._arrived(wanted) > before:
                waits = list(RETRY_WAITS_S)
            if not waits:
                raise FtError(
                    f"Service Unavailable: the download of {self._name} broke off {len(RETRY_WAITS_S) + 1} times "
                    f"without a byte in between: {reason}. What has arrived stays")
            print(f"model: {reason or 'the connection broke'}; next try in {waits[0]:.0f} s", flush=True)
            _pause(waits.pop(0), self._stop)
        self.downloaded += self._arrived(wanted) - begun_with

    def _run(self, left: list[str], wanted: list[str], total: int) -> tuple[int, str]:
        """One process until it ends: its exit code and reason. Interrupted when asked to stop."""
        order = hubget.Order(
            name=self._name, commit=self._repository.commit, cache=str(self._cache),
            files={file: self._repository.files[file] for file in left}, kind=self._kind)
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_DISABLE_TELEMETRY": "1"}
        if max(order.files.values()) < hubget.LARGEST_HTTP_BYTES:
            # The Hub's own protocol for large files keeps nothing of a file that was cut; plain HTTP resumes it.
            environment["HF_HUB_DISABLE_XET"] = "1"
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "ftlib.hubget", hubget.argument(order)], env=environment, cwd=root,
                # A terminal's Ctrl-C is for us alone.
                stdin=subprocess.DEVNULL, stderr=said, start_new_session=True)  # fmt: skip
            progress = _Progress(self._name, total, self._arrived(wanted), self._committed)
            try:
                while child.poll() is None:
                    self._stop.check()
                    if not self._lease.keep():
                        raise FtError(f"another process has taken over the download of {self._name}")
                    progress.look(self._arrived(wanted), self._whole(wanted), len(wanted))
                    time.sleep(POLL_S)
            finally:
                _end(child)
            progress.look(self._arrived(wanted), self._whole(wanted), len(wanted), last=True)
            said.seek(0)
            lines = said.read().strip().splitlines()
        return child.returncode, lines[-1] if lines else ""

    def _whole(self, wanted: list[str]) -> int:
        return sum((self._snapshot / file).is_file() for file in wanted)

    def _arrived(self, wanted: list[str]) -> int:
        """Bytes of `wanted` that are there, those of files in part included."""
        whole = [self._snapshot / file for file in wanted if (self._snapshot / file).is_file()]
        return sum(path.stat().st_size for path in whole) + hubget.partial_bytes(self._folder)


class _Progress:
    """Lines for the log (GB, MB/s, time left), and an event for each piece that stays."""

    def __init__(self, name: str, total: int, arrived: int, committed: Callable[[str], None]) -> None:
        self._name = name
        self._total = total
        self._begun_with = arrived
        self._begun = time.monotonic()
        self._reported_at = self._begun - REPORT_S + 1
        self._committed = committed
        self._told_files: int | None = None
        self._told_bytes = arrived

    def look(self, arrived: int, whole: int, files: int, *, last: bool = False) -> None:
        """Take note of `arrived` bytes and `whole` of `files` files."""
        if self._told_files is None:
            self._told_files = whole
        if whole > self._told_files or arrived - self._told_bytes >= PIECE_BYTES:
            self._told_files, self._told_bytes = whole, arrived
            self._committed(f"{self._name}: {whole} of {files} files, {arrived / GB:.2f} GB")
        now = time.monotonic()
        if now - self._reported_at < REPORT_S and not last:
            return
        self._reported_at = now
        speed = (arrived - self._begun_with) / max(now - self._begun, 1e-3)
        left_min = (self._total - arrived) / speed / 60 if speed else None
        left = "" if left_min is None or arrived >= self._total else f", {left_min:.1f} min left"
        print(
            f"{self._name}: {arrived / GB:.2f} of {self._total / GB:.2f} GB, {whole} of {files} files, "
            f"{speed / 1e6:.1f} MB/s{left}", flush=True)  # fmt: skip


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _point_to(folder: Path, revision: str | None, commit: str) -> None:
    """Remember which commit a branch or tag stood for, as huggingface_hub does: offline jobs look there."""
    if revision == commit:
        return
    reference = folder / "refs" / (revision or modelfiles.MAIN)
    reference.parent.mkdir(parents=True, exist_ok=True)
    if not reference.is_file() or reference.read_text(encoding="utf-8").strip() != commit:
        atomic.write_text(reference, commit)
