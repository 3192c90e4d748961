"""What the ranks of one training job agree on. With one process every function is local and free."""

import itertools
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from ftlib.errors import FtError, Interrupted
from ftlib.stop import StopFlag

store: dist.Store | None = None  # of rendezvous: ranks that need no collective hear of each other through it
_turns = itertools.count()


def world_size() -> int:
    """Number of processes in this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 writes the run's files."""
    return int(os.environ.get("RANK", "0"))


def say(words: str) -> None:
    """Print a line, from rank 0 alone."""
    if rank() == 0:
        print(words, flush=True)


def device() -> torch.device:
    """Where this rank's collectives take their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def check(stop: StopFlag) -> None:
    """Interrupted on all ranks when one is asked to stop. Collective: every rank calls it at the same point."""
    if cause := agreed(stop, False)[0]:
        raise Interrupted(cause)


def agreed(stop: StopFlag, save_due: bool) -> tuple[str | None, bool]:
    """The cause for which all ranks stop here, or None; and whether the first rank finds a save due. Collective."""
    if world_size() == 1:
        return stop.cause, save_due
    flags = torch.tensor([int(bool(stop)), int(save_due and rank() == 0)], device=device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    stopping, due = flags.tolist()
    return next(filter(None, gathered(stop.cause))) if stopping else None, bool(due)


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def summed(*values: float) -> list[float]:
    """Each value summed over all ranks. Collective."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()  # type: ignore[no-any-return]


def first_alone(work: Callable[[], None]) -> None:
    """Rank 0 does `work`; the others wait as long as it takes, and raise the FtError that it raises. Collective."""
    if world_size() == 1:
        return work()
    assert store is not None
    key, error = f"alone/{next(_turns)}", None
    if rank() == 0:
        try:
            work()
        except FtError as found:
            error = found
        store.set(key, pickle.dumps(error))
    else:
        store.wait([key], timedelta(days=7))
        error = pickle.loads(store.get(key))
    if error is not None:
        raise error


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
