"""What each point of a sweep still needs, and how the needs are put into as few arrays as the site's limits allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ftlib import atomic, state
from ftlib.plan.plan import RunPlan, StagePlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.runs.events import Cancelled
from ftlib.runs.ledger import Ledger
from ftlib.slurm import batch
from ftlib.slurm.client import Job
from ftlib.slurm.queue import UNKNOWN
from ftlib.state import ACTIVE
from ftlib.sweepdir import SweepDir, share_prepared
from jobs import guard

X = TypeVar("X")
Y = TypeVar("Y")
View = Mapping[str, Job]  # Slurm's jobs by their ids


def threaded(call: Callable[[X], Y], items: Iterable[X]) -> list[Y]:
    """`call` of each item, in threads: a shared filesystem answers each process slowly, and many at once."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(call, items))


def active(view: View, job: str) -> bool:
    """Whether the job is queued or running."""
    return state.SLURM_STATES.get(view.get(job, Job("")).state) in ACTIVE


@dataclass(frozen=True)
class Need:
    """A point whose `stages` are to be queued, in order."""

    run: Path
    stages: tuple[str, ...]
    plan: RunPlan
    dataset: str  # points with the same one share a dataset: the same wish for it, and the same code
    prepare: str | None = None  # the job that is preparing its dataset
    prepared_by: Path | None = None  # the run whose job that is, or will be
    before: str | None = None  # else the active job of its own after which the first stage comes
    behind: tuple[str, ...] = ()  # its jobs that wait for what has failed: to be cancelled
    automatic: bool = False  # queued again by the feeder, on its own account

    @property
    def tasks(self) -> tuple[str, ...]:
        """The stages that run in tasks of its own; prepare is one job a dataset."""
        return tuple(stage for stage in self.stages if stage != "prepare")

    @property
    def jobs(self) -> tuple[tuple[str, ...], ...]:
        """`tasks`, those that share a task together."""
        together = (tuple(stage for stage in stages if stage in self.tasks) for stages in self.plan.jobs)
        return tuple(stages for stages in together if stages)


@dataclass(frozen=True)
class Chunk:
    """Points that go through the same arrays, each under its index."""

    needs: dict[int, Need]
    jobs: tuple[tuple[str, ...], ...]  # the stages of each array, without prepare

    def asked(self, profile: ClusterProfile, stages: Sequence[str]) -> StagePlan:
        """What the array of some stages asks for: as much as the most demanding of its points."""
        needs = [need for need in self.needs.values() if stages[0] in need.stages]
        plans = [batch.request(profile, need.plan, stages) for need in needs]
        return plans[0].model_copy(
            update={name: max(getattr(plan, name) for plan in plans) for name in ("mem_gib", "time_min", "warning_s")}
        )


def need_of(run: RunDir, known: Ledger, view: View, *, by: str, told: dict[Path, str | None]) -> Need | str:
    """What must be queued of a run, or why nothing is: "completed", "on its way", "cancelled", or the guard's words.

    by: "sweep" (missing and failed), "resume" (cancelled, too) or "feeder" (what the guard's rules allow; its words
    are kept in `told`, for a dataset's one job is many points').
    """
    found = state.stages(known, view)
    if any(view.get(s.job_id or "", Job("")).state == UNKNOWN for s in found.values() if s.state != "completed"):
        return "how its job ended cannot be learned now, as accounting does not answer; make resume later"
    first = next((stage for stage in STAGES if found[stage].state not in ("completed", *ACTIVE)), None)
    if first is None:
        return "completed" if state.overall(found) == "completed" else "on its way"
    job = found[first].job_id
    ended = {event.job_id for event in known.of(Cancelled)}
    if any(stage.state in ACTIVE and stage.job_id in ended for stage in found.values()):
        return "was cancelled and is still saving; again in a moment"
    if job and by == "feeder":
        whose = run.path.parent / (known.submissions[first].prepared_by or run.name)
        if whose not in told:
            told[whose] = guard.why_not(RunDir(whose), view)
        if words := told[whose]:
            return words
    elif job and by == "sweep" and state.overall(found) == "cancelled":
        return "cancelled"
    position = STAGES.index(first)
    before = [name for name in STAGES[:position] if found[name].state in ACTIVE]
    waits = found[before[-1]].job_id if before else None
    return Need(
        run.path, tuple(stage for stage in STAGES[position:] if found[stage].state != "completed"),
        RunPlan.model_validate(run.plan()),
        f"{run.provenance().get('dataset', run.name)}-{run.code.resolve().name}",
        prepare=waits if before == ["prepare"] else None, before=waits if before != ["prepare"] else None,
        behind=tuple(j for stage in STAGES[position:] if found[stage].state in ACTIVE and (j := found[stage].job_id)),
        automatic=by == "feeder" and job is not None,
    )  # fmt: skip


def fitting(needs: Sequence[Need], free: float) -> list[Need]:
    """The first of `needs` that `free` jobs of room hold, each dataset's prepare job counted once."""
    datasets: set[str] = set()
    for number, need in enumerate(needs):
        free -= len(need.jobs) + ("prepare" in need.stages and need.dataset not in datasets)
        if free < 0:
            return list(needs[:number])
        datasets.add(need.dataset)
    return list(needs)


def chunks(needs: Iterable[Need], profile: ClusterProfile) -> list[Chunk]:
    """As few chunks as resource shapes and MaxArraySize allow; points that follow an array keep its indices."""
    assert profile.scheduler
    most = profile.scheduler.max_array_size
    groups: dict[Any, list[Need]] = {}
    for need in needs:
        shapes = tuple(_shape(need.plan, stages) for stages in need.jobs)
        groups.setdefault((need.jobs, (need.before or "").partition("_")[0], shapes), []).append(need)
    found = []
    for (jobs, follows, _), members in groups.items():
        if follows:
            indexed = {int((need.before or "").partition("_")[2] or 0): need for need in members}
            found.append(Chunk(dict(sorted(indexed.items())), jobs))
        else:
            parts = [members[start : start + most] for start in range(0, len(members), most)]
            found += [Chunk(dict(enumerate(part)), jobs) for part in parts]
    return found


def _shape(plan: RunPlan, stages: Sequence[str]) -> tuple[Any, ...]:
    """What must be equal in one array. Of memory and time the order of magnitude: an array asks for the most."""
    request = plan.request(stages)
    asked = request.model_dump(exclude={"estimate_min", "mem_gib", "time_min", "warning_s"})
    near = [math.ceil(math.log2(getattr(request, name))) for name in ("mem_gib", "time_min")]
    return *asked.values(), *near, plan.compute_dtype, plan.threads, plan.deterministic


def share_datasets(sweep: SweepDir, needs: Iterable[Need], view: View) -> list[Need]:
    """`needs` in which each dataset is prepared by one point alone, or by none where that was done before."""
    found, siblings = [], dict[Path, list[str]]()
    owners: dict[str, tuple[RunDir, str | None]] = {}
    sweep.datasets.mkdir(exist_ok=True)
    for need in needs:
        if "prepare" not in need.stages:
            found.append(need)
            continue
        if need.dataset not in owners:
            owners[need.dataset] = _owner(sweep, need, view)
        owner, job = owners[need.dataset]
        if owner.prepared_file.exists():
            share_prepared(owner, [RunDir(need.run)])
            found.append(replace(need, stages=need.tasks))
        elif owner.path == need.run:
            siblings.setdefault(owner.path, [])
            found.append(replace(need, prepared_by=owner.path))
        else:
            siblings.setdefault(owner.path, []).append(need.run.name)
            found.append(replace(need, stages=need.tasks, prepare=job, prepared_by=owner.path))
    for path, names in siblings.items():
        run = RunDir(path)
        known = [sibling.name for sibling in run.siblings()]
        atomic.write_text(run.siblings_file, "\n".join(dict.fromkeys([*known, *names])))
        # It may have ended in between: its job reads the siblings after it has written this file.
        if run.prepared_file.exists():
            share_prepared(run, run.siblings())
    return found


def _owner(sweep: SweepDir, need: Need, view: View) -> tuple[RunDir, str | None]:
    """The point that has prepared the dataset, or whose job does so now, and that job; else this point."""
    file = sweep.datasets / need.dataset
    if file.exists():
        other = RunDir(sweep.runs / file.read_text(encoding="utf-8").strip())
        job = other.ledger().jobs.get("prepare", "") if other.path != need.run else ""
        if other.prepared_file.exists() or active(view, job):
            return other, job
    atomic.write_text(file, need.run.name)
    return RunDir(need.run), None
