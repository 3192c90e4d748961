"""Imports and model loading take longer than some grace periods: they can be left in the middle. No torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from ftlib.errors import Interrupted
from ftlib.stop import StopFlag

T = TypeVar("T")


def interruptible(stop: StopFlag, work: Callable[[], T]) -> T:
    """`work()`, given up with Interrupted as soon as the flag is set.

    Work that is given up goes on in its thread until the process ends: it must commit nothing, and the process must
    not go on (transformers changes global state while it loads). Only for a single process: a rank that leaves
    alone would let the others wait.
    """
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:
            results.put((None, error))

    if stop.cause is not None:
        raise Interrupted(stop.cause)
    threading.Thread(target=run, daemon=True).start()
    while True:
        try:
            result, error = results.get(timeout=0.1)
        except queue.Empty:
            if stop.cause is not None:
                raise Interrupted(stop.cause) from None
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
