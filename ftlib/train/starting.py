"""How long each part of a life's start took, from the process's own beginning to its first new step. No torch."""

from __future__ import annotations

import time

import psutil


class StartTimes:
    """Parts one after the other, without gaps: their sum is the time from the process's start to the last of them.

    `imports_s` is done when this is made; then `check_s` (the newest checkpoint verified), `load_s` (base model and
    adapter), `optimizer_s` (Trainer, optimizer and their state), `validation_s` where one was left over, and
    `first_step_s`.
    """

    def __init__(self) -> None:
        self._at = psutil.Process().create_time()
        self.parts: dict[str, float] = {}
        self.done("imports_s")

    def done(self, part: str) -> None:
        """This part ends now."""
        now = time.time()
        self.parts[part] = round(now - self._at, 3)
        self._at = now
