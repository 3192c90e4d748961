"""The stop flag: Slurm's warnings become a flag that the work looks at when it can stop. No torch."""

import signal
import time
from types import FrameType

from ftlib.errors import Interrupted


class StopFlag:
    """Set by SIGUSR2 (time limit near) or SIGTERM (preemption, cancel). Its handlers do nothing else."""

    def __init__(self) -> None:
        self.cause: str | None = None
        self.at: float | None = None  # when the signal came, by time.monotonic()

    def install(self) -> "StopFlag":
        """Take over the two signals; from the main thread, before any heavy import."""
        signal.signal(signal.SIGUSR2, self._set)
        signal.signal(signal.SIGTERM, self._set)
        # Slurm sends it before SIGTERM, to wake suspended tasks; its default action is what we want.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        return self

    def _set(self, number: int, _frame: FrameType | None) -> None:
        # The first cause stands: at the time limit SIGTERM follows SIGUSR2.
        if self.cause is None:
            self.cause, self.at = "time limit" if number == signal.SIGUSR2 else "preemption", time.monotonic()

    def __bool__(self) -> bool:
        return self.cause is not None

    def check(self) -> None:
        """Interrupted when it is set."""
        if self.cause is not None:
            raise Interrupted(self.cause)
