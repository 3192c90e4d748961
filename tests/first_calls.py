"""How many first calls of a vector function go wrong, each in a fresh process of eight threads; prints their number.

    python -m tests.first_calls COUNT [bare]

Each process calls one function twice, for the same numbers: only the first call can differ from what comes after it.
bare: without what a stage does before its first computation (ftlib.train.kernels.choose).
"""

from __future__ import annotations

import os
import sys
from itertools import cycle, islice

import torch

from ftlib.plan.numerics import KernelSwitches
from ftlib.train import kernels

NUMBERS, THREADS, AT_ONCE = 1 << 16, 8, 2


def differs(name: str, *, bare: bool) -> bool:
    """Whether this process's first call of a function gave other numbers than its second."""
    torch.set_num_threads(THREADS)
    if not bare:
        # Deterministic mode would load a compiler: a second for each process.
        kernels.choose(KernelSwitches(), on_gpu=False, deterministic=False)
    numbers = torch.arange(1, NUMBERS + 1) / (NUMBERS + 2)  # the threads begin here
    function = getattr(torch, name)
    return not torch.equal(function(numbers), function(numbers))


def main(count: int, *, bare: bool) -> int:
    """How many of so many processes found a difference."""
    torch.set_num_threads(1)  # a process with threads must not fork
    wrong = running = 0
    for name in [*islice(cycle(kernels.VECTOR_MATH), count), *[""] * AT_ONCE]:
        if running == AT_ONCE or (not name and running):
            code = os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1])
            assert code in (0, 1), f"a process ended with {code}"
            wrong, running = wrong + code, running - 1
        if name:
            running += 1
            if not os.fork():
                code = 2
                try:
                    code = int(differs(name, bare=bare))
                finally:
                    os._exit(code)
    return wrong


if __name__ == "__main__":
    print(main(int(sys.argv[1]), bare="bare" in sys.argv))
