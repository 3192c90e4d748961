"""The progress lines of a training: plain prints, the same in a terminal and in a log."""

from __future__ import annotations

import time
from datetime import timedelta


class Progress:
    """Prints a line every so many steps, with means over the steps since the last line."""

    def __init__(self, total: int, every: int) -> None:
        self._total, self._every = total, every
        self._first = 0
        self._began = time.perf_counter()
        self._losses: list[float] = []
        self._tokens, self._seconds = 0, 0.0

    def resumed(self, step: int) -> None:
        """This life begins after `step`."""
        self._first = step

    def step(self, step: int, *, loss: float, lr: float, tokens: int, seconds: float) -> None:
        """One optimizer step is done."""
        if not self._losses and step == self._first + 1:
            self._began = time.perf_counter() - seconds
        self._losses.append(loss)
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if step % self._every and step != self._total:
            return
        elapsed = time.perf_counter() - self._began
        left = elapsed / (step - self._first) * (self._total - step)
        mean = sum(self._losses) / len(self._losses)
        print(
            f"step {step}/{self._total}  loss {mean:.4f}  lr {lr:.2e}  {self._tokens / self._seconds:,.0f} tokens/s  "
            f"elapsed {_clock(elapsed)}  left {_clock(left)}",
            flush=True,
        )
        self._losses, self._tokens, self._seconds = [], 0, 0.0


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
