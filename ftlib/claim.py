"""One writer a folder, on file systems that many machines share and whose locks cannot be trusted.

A claim is a file `writer` in the folder: HOST PID NONCE. It appears whole (written beside, then hard-linked), so there
is one at most. Its owner touches it every minute. It is stale, and taken over, when its process is gone on this machine
or, for those who say how long, when it has not been touched for so long. No two processes take over the same stale
claim: who does so holds a claim on it, a file writer.DIGEST-OF-THE-STALE-ONE, while it looks once more and replaces it.
That claim may be stale itself, and is taken over in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib import atomic
from ftlib.errors import InputError

NAME = "writer"
TOUCH_EVERY_S = 60.0
# A claim of a machine that cannot be looked at is given up after so long without a touch. Owners of an earlier version
# did not touch theirs; they held them for seconds, unless stages ran in their foreground.
SILENT_S = 300.0
# A version that wrote into the file after making it left it empty where it was killed in between, or the disk was full.
EMPTY_S = 10.0


class Taken(InputError):
    """Another process has the claim, or has just got it."""


@dataclass(frozen=True)
class Owner:
    """Who wrote a claim, as it stands in a file."""

    text: str
    mtime_ns: int
    inode: int

    @property
    def host(self) -> str:
        return self.text.partition(" ")[0].strip()

    @property
    def pid(self) -> int | None:
        """None where the file does not tell."""
        words = self.text.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None

    def works_here(self) -> bool:
        """Whether its process is alive on this machine."""
        return self.host == socket.gethostname() and self.pid is not None and alive(self.pid)

    def same_claim(self, other: Owner | None) -> bool:
        """Whether it is still that claim, touched or not. One without a nonce is known by its file alone."""
        return other is not None and (self.text, self.inode) == (other.text, other.inode)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.text} {self.inode}".encode()).hexdigest()[:12]


def read(folder: Path) -> Owner | None:
    """Who has claimed the folder, alive or not; None where nobody has."""
    return _read(folder / NAME)


@contextlib.contextmanager
def claim(folder: Path, what: str, *, wait_s: float = 0.0, silent_s: float | None = None) -> Iterator[None]:
    """Be the only process that writes `folder`, of which a message speaks as `what`.

    wait_s: how long to wait for another that has it. silent_s: take over a claim of another machine, too, that was not
    touched for so long. Taken says who is writing; InputError where the folder cannot be written.
    """
    me = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex[:12]}"
    deadline = time.monotonic() + wait_s
    _mine.add(me)
    try:
        while True:
            try:
                _acquire(folder / NAME, me, what, silent_s)
                break
            except Taken:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        _touched.add(folder / NAME)
        try:
            yield
        finally:
            _touched.discard(folder / NAME)
            _release(folder / NAME, me)
    finally:
        _mine.discard(me)


def _release(file: Path, me: str) -> None:
    with contextlib.suppress(OSError, InputError):  # its folder is gone, or its file server: it is stale in a moment
        standing = _read(file)
        # Where this process was stopped for long, another may have taken it over.
        if standing is not None and standing.text == me:
            file.unlink(missing_ok=True)


def _acquire(file: Path, me: str, what: str, silent_s: float | None) -> None:
    """Make `file` with the content `me`, over a stale claim if need be. Taken, or InputError."""
    for _ in range(3):  # while claims come and go
        try:
            if atomic.create_text(file, me, durable=False):
                return
        except OSError as error:
            why = f"{error.strerror}{_whose(file.parent)}"
            raise InputError(f"{what}: {file.parent} cannot be written ({why})") from None
        standing = _read(file)
        if standing is None:
            continue
        if not _stale(standing, file, silent_s):
            raise Taken(
                f"{what}: another process is writing {file.parent} (process {standing.pid or '?'} on "
                f"{standing.host or 'an unknown machine'}). Wait for it; if it is gone for good, delete {file}")
        right = file.with_name(f"{file.name}.{standing.digest()}")
        try:
            _acquire(right, me, what, silent_s)
        except Taken:
            break
        try:
            # It was stale before we had the right to replace it; another may have had it first.
            now = _read(file)
            if now is not None and standing.same_claim(now) and _stale(now, file, silent_s):
                atomic.write_text(file, me)
                return
        finally:
            right.unlink(missing_ok=True)
    raise Taken(f"{what}: another process has just begun to write {file.parent}")


def _read(file: Path) -> Owner | None:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            facts = os.fstat(opened.fileno())
            return Owner(opened.read().strip(), facts.st_mtime_ns, facts.st_ino)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). If nobody writes there, delete it") from None


def _stale(owner: Owner, file: Path, silent_s: float | None) -> bool:
    """Whether nobody holds that claim any more."""
    if owner.host == socket.gethostname() and owner.pid == os.getpid():
        return owner.text not in _mine  # an ended process had the number that this one got
    if owner.host == socket.gethostname() and owner.pid is not None:
        return not alive(owner.pid)
    patience_s = EMPTY_S if not owner.text else silent_s
    return patience_s is not None and _now_ns(file.parent) - owner.mtime_ns > patience_s * 1e9


def _now_ns(folder: Path) -> int:
    """Now by the clock of the folder's file server, against which the age of its files can be told."""
    probe = atomic.temporary_beside(folder / NAME)
    try:
        probe.touch()
        return probe.stat().st_mtime_ns
    except OSError:
        return time.time_ns()
    finally:
        probe.unlink(missing_ok=True)


def _whose(folder: Path) -> str:
    try:
        return f"; it belongs to {folder.owner()}" if folder.stat().st_uid != os.getuid() else ""
    except (OSError, KeyError):  # gone, or of a user whom this machine does not know
        return ""


def alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Touched:
    """The claims that this process holds, kept young by one thread: a sweep holds thousands at once."""

    def __init__(self) -> None:
        self._files: set[Path] = set()
        self._lock = threading.Lock()
        self._process = 0  # the one whose thread runs: a fork has none

    def add(self, file: Path) -> None:
        with self._lock:
            self._files.add(file)
            if self._process != os.getpid():
                self._process = os.getpid()
                threading.Thread(target=self._run, daemon=True).start()

    def discard(self, file: Path) -> None:
        with self._lock:
            self._files.discard(file)

    def _run(self) -> None:
        while True:
            time.sleep(TOUCH_EVERY_S)
            with self._lock:
                files = list(self._files)
            for file in files:
                with contextlib.suppress(OSError):  # gone with its folder, or a file server that is away for a moment
                    os.utime(file)


_touched = _Touched()
# What this process writes into its claims.
_mine: set[str] = set()
