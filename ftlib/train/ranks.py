"""What the ranks of one training job agree on. With one process every function is local and free.

What they tell each other is JSON, never a pickle: the store listens on the network, and whoever reaches it can write
there. So all that is read from it is data of bounded size, and no secret is put into it."""

import itertools
import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from ftlib.errors import FtError, InputError, Interrupted, Unavailable
from ftlib.stop import StopFlag

store: dist.Store | None = None  # of rendezvous: ranks that need no collective hear of each other through it
_turns = itertools.count()
# Most that one rank tells the others: a checkpoint's files with their checksums, say.
GATHERED_BYTES = 64 << 20
# Most of an error that rank 0 tells the others.
ERROR_BYTES = 64 << 10
_ERRORS: dict[str, type[FtError]] = {kind.__name__: kind for kind in (FtError, InputError, Unavailable)}


def world_size() -> int:
    """Number of processes in this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 writes the run's files."""
    return int(os.environ.get("RANK", "0"))


def here() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


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
    """Every rank's value, in order of rank, on every rank. Collective. value: what JSON can hold (a tuple becomes a
    list). FtError on all ranks when one rank's takes more than GATHERED_BYTES."""
    if world_size() == 1:
        return [value]
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device())
    size = torch.tensor([message.numel()], device=device())
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(length) for length in sizes]
    if max(lengths) > GATHERED_BYTES:
        raise FtError(f"a rank has {max(lengths):,} bytes to tell the others, more than {GATHERED_BYTES:,}")
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device())
    padded[: message.numel()] = message
    messages = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(messages, padded)
    both = zip(messages, lengths, strict=True)
    return [json.loads(bytes(text[:length].cpu().numpy())) for text, length in both]


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
        except FtError as raised:
            error = raised
        store.set(key, _error_to_text(error))
    else:
        store.wait([key], timedelta(days=7))
        error = _error_from_text(store.get(key))
    if error is not None:
        raise error


def _error_to_text(error: FtError | None) -> str:
    """An error for the other ranks; None: there was none."""
    if error is None:
        return "null"
    if isinstance(error, Interrupted):
        return json.dumps({"kind": "Interrupted", "cause": error.cause, "step": error.step})
    kind = next((name for name, known in _ERRORS.items() if type(error) is known), "FtError")
    # JSON takes at most six bytes for a character.
    return json.dumps({"kind": kind, "message": str(error)[: ERROR_BYTES // 8]})


def _error_from_text(found: bytes) -> FtError | None:
    """What `_error_to_text` wrote; what is anything else is an FtError itself."""
    try:
        if len(found) > ERROR_BYTES:
            raise ValueError
        told = json.loads(found)
        if told is None:
            return None
        if told["kind"] == "Interrupted":
            return Interrupted(str(told["cause"]), None if told["step"] is None else int(told["step"]))
        return _ERRORS[told["kind"]](str(told["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return FtError(f"what rank 0 left for rank {rank()} in the store is not readable: {found[:80]!r}")


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
