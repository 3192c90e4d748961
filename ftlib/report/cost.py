"""What a run cost, from its events: lives, wall time and GPU-hours of each stage."""

import datetime
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ftlib.runs.events import CheckpointSaved, Decided, Ended, Event, Settled, Started
from ftlib.runs.ledger import Ledger


@dataclass(frozen=True)
class StageCost:
    """One stage: how often it was started, seconds over all lives, those of work that was lost, GPUs it held."""

    stage: str
    lives: int
    seconds: float
    lost_seconds: float
    gpus: int

    @property
    def gpu_hours(self) -> float:
        """GPUs held times wall time, in hours."""
        return self.gpus * self.seconds / 3600

    @property
    def lost_gpu_hours(self) -> float:
        """Of these, what was worked after the last save of lives that ended without one."""
        return self.gpus * self.lost_seconds / 3600


def stage_costs(
    known: Ledger, plan: dict[str, Any], now: float, running: Collection[str] | None = None
) -> list[StageCost]:
    """Costs of the stages that began, in order. A life without an end lasts until its last event; the newest of a stage
    that is `running` (of every stage without that) until `now`, in seconds since 1970.
    Where a clock was set back, the time that it took back counts as none."""
    lives: dict[str, dict[int, list[Event]]] = {}
    for (stage, life), events in known.by_attempt.items():
        lives.setdefault(stage, {})[life] = events
    costs = []
    for stage, of_stage in lives.items():
        begun = {life: mine for life, mine in of_stage.items() if any(isinstance(event, Started) for event in mine)}
        starts = [event for mine in begun.values() for event in mine if isinstance(event, Started)]
        seconds = lost = 0.0
        for life, mine in begun.items():
            began = next(event for event in mine if isinstance(event, Started)).time
            ends = [event for event in mine if isinstance(event, (Ended, Settled))]
            at_work = not ends and life == max(begun) and (running is None or stage in running)
            ended = now if at_work else _end(mine)
            seconds += max(0.0, ended - began)
            # What the life itself reports comes before what srun returned to its epilogue.
            code = next((event.code for event in ends if isinstance(event, Ended)), ends[-1].code if ends else None)
            if not at_work and code not in (0, 75):
                saves = [event.time for event in mine if isinstance(event, CheckpointSaved)]
                lost += max(0.0, ended - (saves[-1] if saves else began))
        asked = (plan.get("stages") or {}).get(stage) or {}
        on_gpu = asked.get("device", plan.get("device")) == "cuda"
        # What its job held on a node, where that was noted: as many as the most demanding stage of the job needs.
        held = max((start.gpus or 0 for start in starts), default=0) or asked.get("gpus_per_node", 0)
        gpus = asked.get("nodes", 1) * held if on_gpu else 0
        if begun:
            costs.append(StageCost(stage, len(begun), seconds, lost, gpus))
    return costs


def _end(mine: list[Event]) -> float:
    """When a life ended, of which these are the events. One that was settled later did so when Slurm says, or else with
    its own last event."""
    settled = [event for event in mine if isinstance(event, Settled)]
    if settled and settled[-1].ended is not None:
        return settled[-1].ended
    own = [event.time for event in mine if not isinstance(event, Decided) and not _settled_later(event)]
    return own[-1]


def _settled_later(event: Event) -> bool:
    return isinstance(event, Settled) and event.by != "epilogue"


def time_of(row: dict[str, Any]) -> datetime.datetime:
    """When a row of metrics was written, by its writer's clock."""
    return datetime.datetime.fromisoformat(row["time"])
