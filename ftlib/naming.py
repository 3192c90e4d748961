"""Which run folder a request belongs to: named by a hash, with a suffix where that folder holds another request."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ftlib.errors import InputError
from ftlib.spec import RunSpec, read


@dataclass(frozen=True, kw_only=True)
class Request:
    """What tells one run from another."""

    spec: RunSpec
    data_digest: str  # of the data's content
    cluster: str  # the cluster's name

    @property
    def identity(self) -> str:
        """Text that is equal for equal requests only; the description does not count."""
        return json.dumps([self.spec.changed(), self.data_digest, self.cluster], sort_keys=True)

    @property
    def name(self) -> str:
        """The run's name, without a suffix: the recipe's name and a hash."""
        return f"{self.spec.recipe}-{self.spec.run_hash(data_digest=self.data_digest, cluster=self.cluster)}"


@dataclass(frozen=True, kw_only=True)
class RunName:
    """The name that a request's run has."""

    name: str
    exists: bool  # whether that run is there already
    others: tuple[str, ...] = ()  # names that were passed over, for they hold another run

    @property
    def message(self) -> str:
        """What a person is told of the names that were passed over; empty where none was."""
        if not self.others:
            return ""
        verb = "holds" if len(self.others) == 1 else "hold"
        return f"{', '.join(self.others)} {verb} another run's settings, so this run is {self.name}."


def holds(folder: Path, request: Request) -> bool:
    """Whether the run in `folder` was made for `request`: the same settings once they are resolved (a field that the
    folder's version did not have counts with its default), the same data, the same cluster."""
    try:
        spec = read(RunSpec, folder / "spec.json")
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError):  # another version's, damaged, or no run at all
        return False
    if not isinstance(provenance, dict):
        return False
    made_for = (provenance.get("data_digest"), provenance.get("cluster"))
    without = {"description"}
    same_spec = spec.model_dump(exclude=without) == request.spec.model_dump(exclude=without)
    return same_spec and made_for == (request.data_digest, request.cluster)


def choose(runs: Path, request: Request, *, new: bool = False, taken: Collection[str] = ()) -> RunName:
    """The run of `request` in the folder `runs`; where there is none, or `new` asks for another, the first free name.

    taken: names that are given to other requests already, though their folders are not there yet.
    """
    others: list[str] = []
    name, number = request.name, 1
    while name in taken or (runs / name).exists():
        same = name not in taken and holds(runs / name, request)
        if same and not new:
            return RunName(name=name, exists=True, others=tuple(others))
        if not same:
            others.append(name)
        number += 1
        name = f"{request.name}-{number}"
    return RunName(name=name, exists=False, others=tuple(others))
