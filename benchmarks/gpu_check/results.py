"""Results, a JSON line each, on the disk before the next check begins; and the time that a group may take.

A row: {"group", "check", "status", "seconds", "values", "reason", "by"}. status is one of
ok, failed     a check of correctness (the exit code follows from these)
measured       figures, with nothing to be right or wrong about
error          figures could not be taken: `reason` says why, they stay null
skipped        not made here, `reason` says why; its figures stay null
not reached    the group's time was over first
by: the device, and the version of torch and of every package that counts. The torch of a bare machine is another than
the lock's, so each figure says so itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
VERSIONS = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "numpy")
BAD = ("failed",)
REASON_CHARACTERS = 1500


# A kernel that failed leaves its process without a GPU: every later call fails the same way.
POISON = ("CUDA error", "device-side assert")
POISONED = 99


class Skip(Exception):
    """Raised by a check that cannot be made here; its message says why."""


class Wrong(Exception):
    """Raised by a check whose figures are not right; carries them into the row."""

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


def torch_of_the_lock() -> str:
    """The version of torch that runs have, from env/torch.txt."""
    lines = (CHECKOUT / "env" / "torch.txt").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def versions() -> dict[str, str | None]:
    """Installed versions by package; None for one that is not there."""
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"torch of the lock": torch_of_the_lock()}


@dataclass
class Recorder:
    """Makes checks of one group, each with its row, within `budget_s` seconds."""

    file: Path
    group: str
    budget_s: float
    device: str  # "cuda" or "cpu"
    dry: bool
    by: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    _earlier: dict[str, dict[str, Any]] | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the group's time is over."""
        return self.budget_s - (time.monotonic() - self.began)

    def check(
        self, name: str, work: Callable[[], dict[str, Any]], *, correctness: bool, needs_s: float = 0
    ) -> dict[str, Any] | None:
        """Do `work` and write its row; returns its figures, None where there are none.
        correctness: an exception is a failure, and figures are ok; otherwise they are a measurement.
        needs_s: what `work` is expected to take; with less time left it is not begun.
        Ends the process with POISONED where the GPU cannot be used by it any more. A process that is started in its
        place passes over the checks that have rows, and returns their figures."""
        if self._earlier is None:
            self._earlier = {row["check"]: row for row in read(self.file) if row["group"] == self.group}
        if name in self._earlier:
            row = self._earlier[name]
            return row["values"] if row["status"] in ("ok", "measured") else None
        if self.left_s < needs_s:
            self.write(name, "not reached", reason=f"{self.left_s:.0f} s left, {needs_s:.0f} s needed")
            return None
        began = time.monotonic()
        try:
            values = work()
        except Skip as error:
            self.write(name, "skipped", reason=str(error))
        except Wrong as error:
            self.write(name, "failed", seconds=time.monotonic() - began, values=error.values, reason=str(error))
        except (Exception, SystemExit) as error:  # one check's failure leaves the others
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            status = "failed" if correctness else "error"
            self.write(name, status, seconds=time.monotonic() - began, reason=reason)
            if any(sign in reason for sign in POISON):
                # Not sys.exit: destructors would call the GPU once more.
                os._exit(POISONED)
        else:
            status = "ok" if correctness else "measured"
            self.write(name, status, seconds=time.monotonic() - began, values=values)
            return values
        return None

    def write(
        self, check: str, status: str, *, seconds: float | None = None, values: dict[str, Any] | None = None,
        reason: str = "",
    ) -> None:
        """Append a row; it is on the disk when this returns."""
        if not self.by:
            self.by = {"device": self.device, **versions()}
        row = {
            "group": self.group, "check": check, "status": status,
            "seconds": None if seconds is None else round(seconds, 2), "values": values or {},
            "reason": reason[:REASON_CHARACTERS], "dry": self.dry, "by": self.by}
        append(self.file, row)
        scalars = {key: value for key, value in row["values"].items() if not isinstance(value, dict | list)}
        shown = ", ".join(f"{key} {value}" for key, value in scalars.items())
        print(f"{status:12} {self.group:9} {check:34} {reason[:300] or shown[:300]}", flush=True)
        sys.stderr.flush()


def append(file: Path, row: dict[str, Any]) -> None:
    """Append one row as a line; it is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> list[dict[str, Any]]:
    """All whole rows; a line that a kill cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def failures(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The checks that failed, as `group: check`."""
    return [f"{row['group']}: {row['check']}" for row in rows if row["status"] in BAD]
