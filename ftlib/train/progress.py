"""What a training says of its time: a line every so many steps, and how long each part of its start took. No torch."""

import time
from datetime import timedelta

import psutil


class Progress:
    """Prints a line every so many steps, with means over the steps since the last line."""

    def __init__(self, total: int, every: int) -> None:
        self._total, self._every, self._first = total, every, 0
        self._losses: list[float] = []
        self._tokens, self._seconds = 0, 0.0

    def resumed(self, step: int) -> None:
        """This life begins after `step`."""
        self._first = step

    def step(self, step: int, *, loss: float, lr: float, tokens: int, seconds: float) -> None:
        """One optimizer step is done."""
        if step == self._first + 1:
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
            f"elapsed {timedelta(seconds=round(elapsed))}  left {timedelta(seconds=round(left))}", flush=True)
        self._losses, self._tokens, self._seconds = [], 0, 0.0


class StartTimes:
    """Seconds of each part of a life's start, without gaps from the process's beginning; `imports_s` ends here."""

    def __init__(self) -> None:
        self._at = psutil.Process().create_time()
        self.parts: dict[str, float] = {}
        self.done("imports_s")

    def done(self, part: str) -> None:
        """This part ends now."""
        now = time.time()
        self.parts[part] = round(now - self._at, 3)
        self._at = now
