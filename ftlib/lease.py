"""A lease on a shared folder: one process of all nodes works in it, and one that died is taken over.

Locks of shared file systems may claim to be held by everyone at once, so none is used. A lease is a numbered file, made
only where none of that number is there; the highest number holds. Its owner rewrites it every few seconds. Who finds it
unchanged for longer than that makes the next number; the former owner, should it wake up, sees that and stops.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from ftlib import atomic
from ftlib.claim import alive

BEAT_S = 10.0
# Attributes and contents of files on a shared file system may be seen a minute late.
ABANDONED_S = 180.0
PREFIX = "ftlib-lease-"


class Lease:
    """One process's claim to `folder`. `owner`: who it works for (a run's stage), one line; attempts of the same owner
    follow one another, so that a later one need not wait for an earlier one to be thought dead."""

    def __init__(self, folder: Path, owner: str) -> None:
        self._folder = folder
        self._owner = owner
        self._number: int | None = None  # of our own file, while we hold the lease
        self._beats = 0
        self._written_at = 0.0
        self._observed = ""  # the holder's file as it was when it last changed
        self._observed_at = 0.0

    def acquire(self) -> str | None:
        """Try once. None: we hold the lease now. Otherwise who holds it, for a message; try again a second later."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = self._newest()
        if number and not self._abandoned(text := self._read(number)):
            host, pid, owner = _parsed(text)
            return f"process {pid} on {host}, for {owner}"
        try:
            handle = os.open(self._file(number + 1), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return "another process that was a moment faster"
        os.close(handle)
        self._number = number + 1
        self._write()
        return None

    def keep(self) -> bool:
        """Call it at least every few seconds; False: another process has taken over, stop at once."""
        assert self._number is not None, "the lease is not held"
        if time.monotonic() - self._written_at >= BEAT_S:
            ours = _parsed(self._read(self._number)) == (socket.gethostname(), str(os.getpid()), self._owner)
            if not ours or self._newest() > self._number:
                self._number = None
                return False
            self._write()
        return True

    def release(self) -> None:
        """Give it up; files of those before us go first, so that none of them holds for a moment."""
        if self._number is None:
            return
        for number in range(1, self._number + 1):
            self._file(number).unlink(missing_ok=True)
        self._number = None

    def _abandoned(self, text: str) -> bool:
        now = time.monotonic()
        if text != self._observed or not self._observed_at:
            self._observed, self._observed_at = text, now
        host, pid, owner = _parsed(text)
        if text and owner == self._owner:
            return True
        if host == socket.gethostname() and pid.isdigit() and not alive(int(pid)):
            return True
        return now - self._observed_at > ABANDONED_S

    def _write(self) -> None:
        assert self._number is not None
        self._beats += 1
        self._written_at = time.monotonic()
        atomic.write_text(
            self._file(self._number), f"{socket.gethostname()}\n{os.getpid()}\n{self._owner}\n{self._beats}\n")

    def _read(self, number: int) -> str:
        with contextlib.suppress(OSError):
            return self._file(number).read_text(encoding="utf-8")
        return ""

    def _newest(self) -> int:
        names = [path.name.removeprefix(PREFIX) for path in self._folder.glob(f"{PREFIX}*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def _file(self, number: int) -> Path:
        return self._folder / f"{PREFIX}{number}"


def _parsed(text: str) -> tuple[str, str, str]:
    """Host, process id and owner of a lease's file."""
    lines = [*text.split("\n"), "", "", ""]
    return lines[0] or "an unknown machine", lines[1] or "?", lines[2] or "an unknown run"
