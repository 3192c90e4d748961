"""Overrides: what changed after a run was submitted, folded from its events. No other file holds such a change.

field                value                                       changed by
-------------------  ------------------------------------------  -------------------------------------------------------
train.micro_batch    rows of a micro-batch (int)                 GPU memory ran out; a resume on another number of nodes
resources.nodes      nodes of the training (int)                 make resume NODES=
memory_mib.STAGE     memory to request on each node, in MiB      host memory ran out
exclude.NODE         true, until a moment                        a faulty GPU
cluster.FIELD        a value of the cluster profile              make resume SET="cluster.FIELD=…"
versions.LOCK        digest of a dependency lock in env/         a resume in a checkout whose locks are others

Gradient accumulation is not among them: it follows from the global batch, the world size and the micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ftlib.runs.events import Event, Override

MICRO_BATCH, NODES = "train.micro_batch", "resources.nodes"
MEMORY, EXCLUDE, CLUSTER, VERSIONS = "memory_mib.", "exclude.", "cluster.", "versions."


@dataclass(frozen=True)
class Overrides:
    """What holds at one moment."""

    micro_batch: int | None = None
    nodes: int | None = None
    memory_mib: dict[str, int] = field(default_factory=dict)  # stage -> MiB on each node
    excluded: tuple[str, ...] = ()  # nodes that were bad within the last day, in the order in which they were found
    cluster: dict[str, Any] = field(default_factory=dict)  # dotted field of the profile -> value, the latest one last
    versions: dict[str, str] = field(default_factory=dict)  # dependency lock in env/ -> digest of its content
    history: tuple[Override, ...] = ()  # every override ever made, oldest first

    def exclude_list(self, owner: str | None) -> str | None:
        """All nodes to keep away from, as sbatch takes them; None without any. owner: the profile's `exclude`, a list
        of hosts as its owner wrote it, where no override has replaced it."""
        owner = self.cluster.get("exclude", owner)
        return ",".join(dict.fromkeys([*filter(None, [owner]), *self.excluded])) or None


def fold(events: Iterable[Event], now: float) -> Overrides:
    """The overrides that hold at `now` (seconds since 1970)."""
    history = tuple(event for event in events if isinstance(event, Override))
    values: dict[str, Any] = {}
    for override in history:
        # The latest value stands last: of cluster.container=null and cluster.container.module=…, it decides.
        values.pop(override.field, None)
        if override.until is None or override.until > now:
            values[override.field] = override.value
    return Overrides(
        micro_batch=values.get(MICRO_BATCH),
        nodes=values.get(NODES),
        memory_mib=_below(values, MEMORY),
        excluded=tuple(_below(values, EXCLUDE)),
        cluster=_below(values, CLUSTER),
        versions=_below(values, VERSIONS),
        history=history,
    )


def _below(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}
