"""What a run cost, from its events: lives, wall time and GPU-hours of each stage."""

import datetime
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

ENDS = ("completed", "interrupted", "failed", "cancelled")


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


def stage_costs(events: list[dict[str, Any]], plan: dict[str, Any], now: datetime.datetime,
                running: Collection[str] | None = None) -> list[StageCost]:
    """Costs of the stages that began, in order. A life without an end lasts until its last event; the newest of a stage
    that is `running` (of every stage without that) until `now`, which has a time zone.
    Where a clock was set back, the time that it took back counts as none."""
    lives: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for event in events:
        if "stage" in event and isinstance(event.get("life"), int):
            lives.setdefault(event["stage"], {}).setdefault(event["life"], []).append(event)
    costs = []
    for stage, found in lives.items():
        found = {life: mine for life, mine in found.items() if any(event["event"] == "started" for event in mine)}
        seconds = lost = 0.0
        for life, mine in found.items():
            began = time_of(next(event for event in mine if event["event"] == "started"))
            ends = [event for event in mine if event["event"] in ENDS]
            last = ends[-1] if ends else mine[-1]
            at_work = not ends and life == max(found) and (running is None or stage in running)
            ended = now if at_work else _end(last, mine)
            seconds += max(0.0, (ended - began).total_seconds())
            if not at_work and last.get("code") not in (0, 75):
                saves = [time_of(event) for event in mine if event["event"] == "checkpoint"]
                lost += max(0.0, (ended - (saves[-1] if saves else began)).total_seconds())
        asked = (plan.get("stages") or {}).get(stage) or {}
        on_gpu = asked.get("device", plan.get("device")) == "cuda"
        # What its job held on a node, where that was noted: as many as the most demanding stage of the job needs.
        begun = [event for mine in found.values() for event in mine if event["event"] == "started"]
        held = max((event.get("gpus", 0) for event in begun), default=0) or asked.get("gpus_per_node", 0)
        gpus = asked.get("nodes", 1) * held if on_gpu else 0
        if found:
            costs.append(StageCost(stage, len(found), seconds, lost, gpus))
    return costs


def _end(last: dict[str, Any], mine: list[dict[str, Any]]) -> datetime.datetime:
    """When a life ended. One that was settled later did so when Slurm says, or else with its own last word."""
    if "ended" in last:
        return datetime.datetime.fromtimestamp(last["ended"], datetime.timezone.utc)
    return time_of(next((event for event in reversed(mine) if "settled_by" not in event), last))


def time_of(event: dict[str, Any]) -> datetime.datetime:
    """When it happened, by its writer's clock."""
    return datetime.datetime.fromisoformat(event["time"])
