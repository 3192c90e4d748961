"""Imports and model loading take longer than some grace periods: they can be left in the middle. No torch."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from ftlib.stop import StopFlag

T = TypeVar("T")


def interruptible(stop: StopFlag, work: Callable[[], T]) -> T:
    """`work()`, given up with Interrupted as soon as the flag is set.
    It goes on in its thread until the process ends, so it must commit nothing, and the process must not go on. Only for
    a single process: a rank that leaves alone would let the others wait."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    stop.check()
    threading.Thread(target=run, daemon=True).start()
    while not wait([result], timeout=0.1).done:
        stop.check()
    return result.result()
