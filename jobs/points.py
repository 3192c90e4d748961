"""What each point of a sweep still needs, and how the needs are put into as few arrays as the site's limits allow."""

from __future__ import annotations

import getpass
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ftlib import atomic, state
from ftlib.errors import InputError
from ftlib.plan.plan import RunPlan, StagePlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import act, decide
from ftlib.runs.decide import Action, Nothing, QueueAnew, Stop
from ftlib.runs.events import Event, Override, ResumeRequested
from ftlib.runs.ledger import Ledger
from ftlib.runs.scheduler import Job, SchedulerView
from ftlib.slurm import batch
from ftlib.slurm.investigate import investigator
from ftlib.state import ACTIVE, StageState
from ftlib.sweepdir import SweepDir, share_prepared
from jobs import placement
from jobs.placement import Placement

X = TypeVar("X")
Y = TypeVar("Y")
View = Mapping[str, Job]  # Slurm's jobs by their ids
# Who wants a sweep's points queued: its owner by `make sweep` (what is missing or failed), by `make resume` (what was
# cancelled, too), or the sweep controller (what the reducer allows without a person).
Asker = Literal["sweep", "resume", "feeder"]
STILL_SAVING = "was cancelled and is still saving; try again in a moment"


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
    dataset: str  # points with the same one share a dataset: the same wish for it, and the same code
    prepare: str | None = None  # the job that is preparing its dataset
    prepared_by: Path | None = None  # the run whose job that is, or will be
    before: str | None = None  # else the active job of its own after which the first stage comes
    behind: tuple[str, ...] = ()  # its jobs that wait for what has failed: to be cancelled
    automatic: bool = False  # queued again by the feeder, on its own account
    decision: tuple[Event, ...] = ()  # to be recorded of the point before it is queued
    where: Placement | None = None  # see `placed`

    @property
    def plan(self) -> RunPlan:
        """The plan of this submission."""
        return self.placement.plan

    @property
    def placement(self) -> Placement:
        """Where the jobs of this submission go."""
        assert self.where is not None, "placed() comes first"
        return self.where

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

    @property
    def all_jobs(self) -> tuple[tuple[str, ...], ...]:
        """The stages of each array, prepare's included where a point prepares its dataset."""
        prepares = any("prepare" in need.stages for need in self.needs.values())
        return (*([("prepare",)] if prepares else []), *self.jobs)

    def asked(self, stages: Sequence[str]) -> StagePlan:
        """What the array of some stages asks for: as much as the most demanding of its points."""
        needs = [need for need in self.needs.values() if stages[0] in need.stages]
        plans = [batch.request(need.placement.profile, need.plan, stages) for need in needs]
        return plans[0].model_copy(
            update={name: max(getattr(plan, name) for plan in plans) for name in ("mem_gib", "time_min", "warning_s")}
        )

    @property
    def profile(self) -> ClusterProfile:
        """Its points' profile; an array keeps away from every node that one of them must avoid."""
        placements = [need.placement for need in self.needs.values()]
        owners = [where.owner_exclude for where in placements if where.owner_exclude]
        bad = [node for where in placements for node in where.excluded]
        exclude = ",".join(dict.fromkeys([*owners, *bad])) or None
        return placements[0].profile.model_copy(update={"exclude": exclude})


def need_of(
    run: RunDir, ledger: Ledger, view: SchedulerView, *, by: Asker, decided: dict[Path, Action]
) -> Need | str:
    """What must be queued of a point, or why nothing is.

    decided: what was decided already about points whose prepare job others share; it grows.
    """
    states = state.stages(ledger, view.jobs)
    if ledger.first_open is None:
        return "completed"
    cancelled = [name for name, stage in states.items() if ledger.cancelled(name, stage.job_id or "-")]
    if any(states[name].state in ACTIVE for name in cancelled):
        return STILL_SAVING
    action = _decide(run, ledger, view, decided, for_dataset=by == "feeder")
    request: tuple[Event, ...] = ()
    if isinstance(action, Nothing) and not action.over:
        if action.cause == "cancelled":
            return STILL_SAVING
        return "on its way" if view.answered else action.message
    if isinstance(action, QueueAnew):
        if not action.stages:  # of a run alone: a sweep's points have the sweep controller
            return "on its way"
        if by != "feeder" and action.job_id:
            request = (_resume_request(ledger),)
    elif by == "feeder":
        return action.message
    elif action.cause == "cancelled" and by == "sweep":
        return "cancelled"
    else:
        request = (_resume_request(ledger),)
    if not any(stage.state not in ("completed", *ACTIVE) for stage in states.values()):
        return "on its way"
    automatic = by == "feeder" and bool(action.job_id)
    return need(run, ledger, states, automatic=automatic, decision=(*action.events(), *request))


def need(
    run: RunDir, ledger: Ledger, states: Mapping[str, StageState], *, automatic: bool = False,
    decision: tuple[Event, ...] = (),
) -> Need:  # fmt: skip
    """All that a point still needs, from its first stage on that is neither done nor under way."""
    first = next(stage for stage in STAGES if states[stage].state not in ("completed", *ACTIVE))
    later = STAGES[STAGES.index(first) :]
    before = [name for name in STAGES[: STAGES.index(first)] if states[name].state in ACTIVE]
    waits = states[before[-1]].job_id if before else None
    return Need(
        run=run.path,
        stages=tuple(stage for stage in later if states[stage].state != "completed"),
        dataset=f"{run.provenance().get('dataset', run.name)}-{run.code.resolve().name}",
        prepare=waits if before == ["prepare"] else None,
        before=waits if before != ["prepare"] else None,
        behind=tuple(job for stage in later if states[stage].state in ACTIVE and (job := states[stage].job_id)),
        automatic=automatic,
        decision=decision,
    )


def _decide(
    run: RunDir, ledger: Ledger, view: SchedulerView, decided: dict[Path, Action], *, for_dataset: bool
) -> Action:
    """What is to be done about a point; `for_dataset`: about the one that prepares its dataset, where that is not done.
    """
    submitted = ledger.submissions.get("prepare")
    prepared_by = submitted.prepared_by if submitted and ledger.first_open == "prepare" else None
    if for_dataset and prepared_by not in (None, run.name):
        owner = RunDir(run.path.parent / str(prepared_by))
        if owner.path not in decided:
            decided[owner.path] = _decide(owner, owner.ledger(), view, decided, for_dataset=False)
        return decided[owner.path]
    if run.path not in decided:
        if decide.open_ends(ledger, view):
            ledger = act.settle(run, view, investigator(run.path), "sweep")
        action = decide.next_action(ledger, view, time.time())
        if isinstance(action, Stop):
            run.record(*action.events())
            action = decide.next_action(run.ledger(), view, time.time())
        decided[run.path] = action
    return decided[run.path]


def _resume_request(ledger: Ledger) -> ResumeRequested:
    attempts = {stage: ledger.attempt_count(stage) for stage in STAGES}
    return ResumeRequested(user=getpass.getuser(), after_attempts=attempts)


def placed(needs: Sequence[Need], ledgers: Mapping[Path, Ledger]) -> tuple[list[Need], dict[str, list[str]]]:
    """`needs` with the placement of their jobs now, as their decisions change it; and of those that cannot be placed,
    why not -> names of runs."""
    changes = {need.run: [event for event in need.decision if isinstance(event, Override)] for need in needs}
    where = placement.of_all([RunDir(need.run) for need in needs], changes=changes, ledgers=ledgers)
    found: list[Need] = []
    refused: dict[str, list[str]] = {}
    for need in needs:
        answer = where[need.run]
        if isinstance(answer, InputError):
            refused.setdefault("; ".join(answer.messages), []).append(need.run.name)
        else:
            found.append(replace(need, where=answer))
    return found, refused


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
        site = need.placement.profile.model_dump_json(exclude={"exclude"})
        groups.setdefault((need.jobs, (need.before or "").partition("_")[0], shapes, site), []).append(need)
    found = []
    for (jobs, follows, *_), members in groups.items():
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
