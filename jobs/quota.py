"""A group's quota on shared storage, by the command that a site has for it (storage.quota_command)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

from ftlib.profile import ClusterProfile

# From here on storage is as good as full: other members of the group write, too.
FULL = 0.97
NEARLY_FULL = 0.9
TIMEOUT_S = 30
UNITS = {"": 2**10, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_FIGURE = re.compile(r"\[?(\d+(?:\.\d+)?)([kmgtp]?)i?b?\]?\*?", re.IGNORECASE)
# A column without a value: no limit, no grace time.
_NONE = ("-", "none", "unlimited")


@dataclass(frozen=True)
class Quota:
    """What a group uses of what it may, in bytes and in files; a limit of 0: there is none."""

    command: str
    used_bytes: float
    limit_bytes: float
    files: float = 0
    limit_files: float = 0

    @property
    def share(self) -> float:
        """How full the fuller of the two is; 0 without limits."""
        parts = ((self.used_bytes, self.limit_bytes), (self.files, self.limit_files))
        return max((used / limit for used, limit in parts if limit), default=0.0)

    @property
    def left_bytes(self) -> float | None:
        """Bytes that may still be written; None without a limit."""
        return max(0.0, self.limit_bytes - self.used_bytes) if self.limit_bytes else None

    def figures(self) -> str:
        """What is used of what, for a person."""
        parts = []
        if self.limit_bytes:
            parts.append(f"{self.used_bytes / 2**30:,.0f} of {self.limit_bytes / 2**30:,.0f} GiB")
        if self.limit_files:
            parts.append(f"{self.files:,.0f} of {self.limit_files:,.0f} files")
        return f"{' and '.join(parts)} are used, says '{self.command}'"


def ask(profile: ClusterProfile) -> Quota | None:
    """The group's quota; None where the profile names no command, it cannot be run, or its answer has no figures."""
    if not profile.storage.quota_command:
        return None
    command = profile.filled(profile.storage.quota_command)
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return parse(command, done.stdout) if done.returncode == 0 else None


def parse(command: str, text: str) -> Quota | None:
    """The fullest row of lfs quota's table: file system, used, quota, limit, grace, files, quota, limit, grace.

    A figure without a unit counts KiB; one in brackets is a lower bound, one with a star is beyond its quota. A long
    file system's name has a line of its own. Where soft and hard limit differ, the soft one counts.
    """
    rows = [quota for line in text.splitlines() if (quota := _row(command, line.split()))]
    return max(rows, key=lambda quota: quota.share, default=None)


def _row(command: str, words: list[str]) -> Quota | None:
    if words and not _is_figure(words[0]):
        words = words[1:]
    if len(words) < 3 or not all(_is_figure(word) or word.lower() in _NONE for word in words[:3]):
        return None
    used, soft, hard = (_bytes(word) for word in words[:3])
    files = [_count(word) for word in words[4:7]] if len(words) >= 7 else [0.0, 0.0, 0.0]
    return Quota(command, used, soft or hard, files[0], files[1] or files[2])


def _is_figure(word: str) -> bool:
    return _FIGURE.fullmatch(word) is not None


def _bytes(word: str) -> float:
    found = _FIGURE.fullmatch(word)
    return float(found[1]) * UNITS[found[2].lower()] if found else 0.0


def _count(word: str) -> float:
    """A number of files: with -h it may have a unit of a thousand."""
    found = _FIGURE.fullmatch(word)
    return float(found[1]) * 1000 ** ("kmgtp".find(found[2].lower()) + 1 if found[2] else 0) if found else 0.0


def problems(profile: ClusterProfile) -> list[str]:
    """A line where the group's storage is full; one that is nearly full gets a warning on stderr."""
    found = ask(profile)
    if found is None or found.share < NEARLY_FULL:
        return []
    words = f"your group's storage is {found.share:.0%} full: {found.figures()}"
    if found.share >= FULL:
        return [f"{words}. Make room (what is below runs/ is the largest part of ours), or ask the group to"]
    print(f"warning: {words}", file=sys.stderr)
    return []


def room_problem(profile: ClusterProfile, need_bytes: int, purpose: str) -> str | None:
    """Why the group's quota does not hold what `purpose` writes; None where it does, or where nothing is known."""
    found = ask(profile)
    if found is None or found.left_bytes is None or found.left_bytes >= need_bytes:
        return None
    return (
        f"no room in your group's quota for {purpose}: {need_bytes / 2**30:,.1f} GiB needed, "
        f"{found.left_bytes / 2**30:,.1f} GiB left ({found.figures()}). Make room, and submit again; nothing is lost")
