"""The errors a user can cause, each with its exit code.

FtError                 1   something went wrong that is nobody's input
├── InputError         64   the user's input is wrong: spec, data, names, files
│   └── Unreadable     64   a file of a run folder is damaged, or may not be read
├── Unavailable        69   a service we need does not answer (the scheduler)
├── Interrupted        75   saved on request: run me again
└── BadGpu             76   a GPU of this node is missing or faulty: run me again on another node
"""

import difflib
from collections.abc import Iterable, Sequence

DONE, INPUT_WRONG, UNAVAILABLE, RUN_AGAIN, RUN_ELSEWHERE = 0, 64, 69, 75, 76


class FtError(Exception):
    """An error whose message is meant for a person. `messages` holds one line or paragraph per problem."""

    exit_code = 1

    def __init__(self, messages: str | Sequence[str]) -> None:
        self.messages = [messages] if isinstance(messages, str) else list(messages)
        super().__init__("\n".join(self.messages))


class InputError(FtError):
    """The user's input is wrong; every problem found is in `messages`."""

    exit_code = INPUT_WRONG


class Unreadable(InputError):
    """A file of a run folder is damaged, or may not be read; the message names it and what to do."""


class Unavailable(FtError):
    """A service that must answer does not (Slurm's controller, say)."""

    exit_code = UNAVAILABLE


class Interrupted(FtError):
    """The stage saved its work at `step` because it was asked to stop; it must be run again."""

    exit_code = RUN_AGAIN

    def __init__(self, cause: str, step: int | None = None) -> None:
        self.cause, self.step = cause, step
        super().__init__(f"interrupted ({cause})" + ("" if step is None else f", saved at step {step}"))

    def __reduce__(self) -> "tuple[type[Interrupted], tuple[str, int | None]]":
        return Interrupted, (self.cause, self.step)


class BadGpu(FtError):
    """This node's GPUs are not what Slurm says they are; another node will do."""

    exit_code = RUN_ELSEWHERE


def closest(name: str, valid: Iterable[str]) -> str:
    """The valid name that `name` may be meant for, else the empty string."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)), "")


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' for the closest valid name, else the empty string."""
    return f" Did you mean {found}?" if (found := closest(name, valid)) else ""


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """One line: what was found, what is allowed, the nearest valid name."""
    names = sorted(valid)
    return f"{what}: {name!r} is unknown. Allowed: {', '.join(names) or '(none)'}.{nearest(name, names)}"
