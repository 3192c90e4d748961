"""Queue what the points of a sweep need: a prepare job a dataset, an array per stage and resource shape, a feeder.

The feeder is the sweep's guard, too: a job of seconds that runs when an array had bad ends, or when there is room for
points that did not fit yet. No process stays on the login node.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlib import events, modelfiles, outcome, state
from ftlib.errors import FtError, InputError
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.slurm import batch, client, container, settle
from ftlib.sweepdir import SweepDir
from jobs import guard, image
from jobs.chain import ModuleExecutor
from jobs.points import Chunk, Need, View, active, chunks, fitting, need_of, share_datasets

FEEDER = "feeder"
# A shared filesystem answers each process slowly, and many at once.
THREADS = 16
# When nothing of the sweep is queued, nothing can call the feeder: it looks again after so long.
LOOK_AGAIN_MIN = 10


@dataclass
class Fed:
    """What was done about a sweep's points."""

    queued: Counter[str] = field(default_factory=Counter)  # stage -> tasks
    arrays: Counter[str] = field(default_factory=Counter)  # stage -> sbatch calls
    waiting: int = 0  # points for which there is no room yet
    told: dict[str, list[str]] = field(default_factory=dict)  # why nothing is queued -> runs

    def words(self) -> str:
        """A line for each thing that was done or left."""
        parts = [f"{stage} {count} in {self.arrays[stage]} array{'s' * (self.arrays[stage] > 1)}"
                 for stage, count in self.queued.items()]  # fmt: skip
        lines = ["Queued: " + ", ".join(parts) if parts else "Nothing was queued."]
        lines += [f"{len(runs):5} {why}" for why, runs in sorted(self.told.items())]
        if self.waiting:
            lines.append(f"{self.waiting:5} wait for room in the queue; the feeder job queues them")
        return "\n".join(lines)


def feed(sweep: SweepDir, *, by: str) -> Fed:
    """Queue what is missing and fits; see `points.need_of` for `by`. Must be called under `sweep.claim()`."""
    kept = sweep.read()
    profile = kept.profile
    assert profile.scheduler
    client.use(profile.scheduler.slurm_conf)
    queue = client.jobs()
    _adopt(sweep, queue)
    runs = sweep.members()
    view: View = {job.id: (job.state, job.reason) for job in queue}
    used = sum(active(view, job.id) for job in queue)
    with ThreadPoolExecutor(THREADS) as pool:
        journals = list(pool.map(state.journal, runs))
    forgotten = {job for known in journals for job in known.jobs.values()} - view.keys()
    view |= {job.id: (job.state, job.reason) for job in client.accounted(sorted(forgotten))}
    fed, needs, told = Fed(), list[Need](), dict[Path, str | None]()
    for run, known in zip(runs, journals, strict=True):
        found = need_of(run, known, view, by=by, told=told)
        if isinstance(found, Need):
            needs.append(found)
        else:
            fed.told.setdefault(found, []).append(run.name)
    most = profile.scheduler.max_jobs
    now = fitting(needs, float("inf") if most is None else most - used - 1)  # one for the feeder
    fed.waiting = len(needs) - len(now)
    feeding = _Feeding(sweep, profile, fed, kept.spec.at_once, kept.cache)
    feeding.image = image.job_before(profile, sweep.runs.parent) if now else None
    for known in journals:
        for stage, job in known.jobs.items():
            if active(view, job):
                feeding.active.setdefault(stage, set()).add(job.partition("_")[0])
    with contextlib.ExitStack() as held:
        seen = {run.path: known.log for run, known in zip(runs, journals, strict=True)}
        mine = [need for need in now if _claimed(need, seen[need.run], held, by=by)]
        if len(mine) < len(now):
            fed.told["another process is queueing it"] = [n.run.name for n in now if n not in mine]
        client.cancel(job for need in mine for job in need.behind)
        refused = feeding.queue(share_datasets(sweep, mine, view))
    feeding.queue_feeder(queue, RunPlan.model_validate(runs[0].plan()))
    if refused:
        raise refused
    return fed


def _claimed(need: Need, known: list[dict[str, Any]], held: contextlib.ExitStack, *, by: str) -> bool:
    """Whether the point is ours to queue: nobody else is at it, or was since its events were those `known`."""
    run = RunDir(need.run)
    if by == "feeder":
        guard.wait_for_the_login_node(run.path)
    try:
        held.enter_context(run.claim())
    except InputError:
        return False
    return _submissions(events.read(run.events)) == _submissions(known)


def _submissions(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in log if event["event"] == "submitted"]


def preview(
    sweep: SweepDir, profile: ClusterProfile, needs: list[Need], at_once: int | None, cache: Path
) -> Iterator[tuple[str, str]]:
    """(what, script) of the arrays that `needs` would be queued in, to the letter but for ids that are not known."""
    feeding = _Feeding(sweep, profile, Fed(), at_once, cache)
    for number, chunk in enumerate(chunks(needs, profile), 1):
        before = ""
        for stage in ("prepare", *chunk.stages):
            indices = [index for index, need in chunk.needs.items() if stage in need.stages]
            after = f"after{'ok' if before == 'prepare' else 'corr'}:<job id of {before}>" if before else None
            if indices:
                made = feeding.executor(chunk, stage, f"<nonce {number}>", indices, after, prepared=False)
                yield f"{stage}.sbatch, {len(indices)} point{'s' * (len(indices) > 1)}", made.script()
            before = stage


def _adopt(sweep: SweepDir, queue: list[client.Job]) -> None:
    """Take in arrays whose submit was killed before it wrote down their ids: the comment holds the intent's nonce."""
    log = events.read(sweep.events)
    answered = {event["nonce"] for event in log if event["event"] == "submitted"}
    for nonce in [e["nonce"] for e in log if e["event"] == "intended" and e["nonce"] not in answered]:
        mine = [(words, job.id) for job in queue if (words := job.comment.split(" "))[-1] == nonce]
        found: dict[str, dict[str, str]] = {}  # index -> stage -> job
        for words, job in mine:
            found.setdefault(job.partition("_")[2], {})[words[2]] = job
        for index, jobs in found.items():
            run = RunDir(sweep.runs / os.readlink(sweep.arrays / nonce / index).rpartition("/")[2])
            _record(run, jobs, dict.fromkeys(jobs, nonce))
            for sibling in run.siblings() if "prepare" in jobs else ():
                _record(sibling, {"prepare": jobs["prepare"]}, {"prepare": nonce}, prepared_by=run.name)
        events.append(sweep.events, events.submit_writer(), "submitted", nonce=nonce)


def _record(
    run: RunDir,
    jobs: dict[str, str],
    nonces: dict[str, str],
    *,
    automatic: bool = False,
    prepared_by: str | None = None,
) -> None:
    """Write into the run's own events under which jobs, whose comments hold which nonces, its stages are queued."""
    rows: list[tuple[events.Name, dict[str, object]]] = []
    lives = Counter(name.rpartition("-")[0] for name in outcome.names(run.lives))
    for stage, job in jobs.items():
        row = {"stage": stage, "job_id": job, "nonce": nonces[stage], "after_life": lives[stage]}
        row["automatic"] = automatic
        whose = {"prepared_by": prepared_by} if stage == "prepare" and prepared_by else {}
        rows.append(("submitted", row | whose))
    events.append_all(run.events, events.submit_writer(), rows)


class _Feeding:
    """The sbatch calls of one feeding."""

    def __init__(self, sweep: SweepDir, profile: ClusterProfile, fed: Fed, at_once: int | None, cache: Path) -> None:
        self.sweep, self.profile, self.fed, self.at_once, self.cache = sweep, profile, fed, at_once, cache
        self.python = profile.python or sys.executable
        self.image: str | None = None  # the job that builds the image, where it is not there yet
        self.active: dict[str, set[str]] = {}  # stage -> arrays, or jobs, that are queued or running
        self.middle: list[str] = []  # tasks whose end means that there is room again

    def queue(self, needs: list[Need]) -> FtError | None:
        """Queue all; the error where sbatch refused, what was queued before it being written down."""
        parts = [(chunk, uuid.uuid4().hex[:12]) for chunk in chunks(needs, self.profile)]
        prepares: dict[Path, str] = {}  # run -> the job that prepares its dataset
        jobs: dict[str, dict[str, str]] = {nonce: {} for _, nonce in parts}  # nonce -> stage -> array
        refused = None
        try:
            for chunk, nonce in parts:
                self._lay_out(chunk, nonce)
                indices = [index for index, need in chunk.needs.items() if "prepare" in need.stages]
                if indices:
                    array = jobs[nonce]["prepare"] = self._sbatch(chunk, "prepare", nonce, indices, None)
                    prepares |= {chunk.needs[index].run: f"{array}_{index}" for index in indices}
            for chunk, nonce in parts:
                after, prepared = self._first_dependency(chunk, prepares)
                for stage in chunk.stages:
                    indices = list(chunk.needs)
                    array = jobs[nonce][stage] = self._sbatch(chunk, stage, nonce, indices, after, prepared=prepared)
                    after, prepared = f"aftercorr:{array}", False
                self.middle = [f"{array}_{index}" for index in indices[len(indices) // 2 :][:3]]
        except FtError as error:
            refused = error
        nonces = {need.run: nonce for chunk, nonce in parts for need in chunk.needs.values() if need.run in prepares}
        for chunk, nonce in parts:
            self._write_down(chunk, nonce, jobs[nonce], prepares, nonces)
        if refused and self.profile.scheduler and self.profile.scheduler.max_jobs and "limit" in str(refused).lower():
            # Other jobs came in between.
            self.fed.waiting += sum(len(c.needs) for c, nonce in parts if set(c.stages) - jobs[nonce].keys())
            return None
        return refused

    def _lay_out(self, chunk: Chunk, nonce: str) -> None:
        """A link per task, by its index, and the folders of its logs, which Slurm does not make."""
        folder = self.sweep.arrays / nonce
        folder.mkdir(parents=True)

        def lay_out(item: tuple[int, Need]) -> None:
            index, need = item
            os.symlink(f"../../../../{need.run.name}", f"{folder}/{index}")
            for stage in need.stages:
                os.makedirs(f"{need.run}/slurm/{stage}", exist_ok=True)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lay_out, chunk.needs.items()))
        events.append(self.sweep.events, events.submit_writer(), "intended", nonce=nonce)

    def _first_dependency(self, chunk: Chunk, prepares: dict[Path, str]) -> tuple[str | None, bool]:
        """sbatch's --dependency of a chunk's first array; whether its tasks must look if their dataset is there."""
        needs, words, prepared = chunk.needs, [], False
        waits = {index: need.prepare or prepares.get(need.prepared_by or Path(), "") for index, need in needs.items()}
        jobs = sorted({job for job in waits.values() if job})
        arrays = sorted({job.partition("_")[0] for job in jobs})
        follows = next(iter(needs.values())).before
        if follows:
            words = [f"aftercorr:{follows.partition('_')[0]}" if "_" in follows else f"afterok:{follows}"]
        elif len(jobs) == 1 and all(waits.values()):
            words = [f"afterok:{jobs[0]}"]
        elif len(arrays) == 1 and all(job == f"{arrays[0]}_{index}" for index, job in waits.items()):
            words = [f"aftercorr:{arrays[0]}"]
        elif jobs:
            words, prepared = [f"afterany:{':'.join(arrays)}"], True
        if self.at_once and (others := self.active.get(chunk.stages[0])):
            words.append(f"afterany:{':'.join(sorted(others))}")  # arrays of one stage never run at the same time
        return ",".join(words) or None, prepared

    def _sbatch(
        self, chunk: Chunk, stage: str, nonce: str, indices: list[int], after: str | None, *, prepared: bool = False
    ) -> str:
        made = self.executor(chunk, stage, nonce, indices, after, prepared=prepared)
        array = made.queue(f"{stage} of {len(indices)} points")
        self.fed.queued[stage] += len(indices)
        self.fed.arrays[stage] += 1
        self.active.setdefault(stage, set()).add(array)
        return array

    def executor(
        self, chunk: Chunk, stage: str, nonce: str, indices: list[int], after: str | None, *, prepared: bool
    ) -> ModuleExecutor:
        """submitit's executor of one array; its task is `python -m jobs.stage`, for which no pickle is needed."""
        needs, folder = [chunk.needs[index] for index in indices], self.sweep.arrays / nonce
        bad = {node for need in needs if need.automatic for node in settle.excluded_nodes(need.run)}
        exclude = ",".join(filter(None, [self.profile.exclude, *sorted(bad)])) or None
        profile = self.profile.model_copy(update={"exclude": exclude})
        words = batch.parameters(
            profile,
            chunk.asked(stage),
            name=f"{self.sweep.name}.{stage}",
            setup=batch.array_setup(
                profile, self._variables(needs[0].plan, stage), self.sweep.runs, folder, prepared=prepared
            ),
            comment=f"ftlib {self.sweep.name} {stage} {nonce}",
            dependency=",".join(filter(None, [after, f"afterok:{self.image}" if self.image else None])) or None,
        )
        run = RunDir(needs[0].run)
        known = run.provenance() if run.provenance_file.exists() else {"checkout": str(self.sweep.runs.parent)}
        made = ModuleExecutor(folder, python=container.worker(profile, needs[0].plan, stage, known))
        made.module = 'jobs.stage "$FT_RUN" "$FT_STAGE"'
        made.update_parameters(**batch.array(words, folder, stage, indices, self.at_once))
        return made

    def _write_down(
        self, chunk: Chunk, nonce: str, arrays: dict[str, str], prepares: dict[Path, str], nonces: dict[Path, str]
    ) -> None:
        def record(index: int) -> None:
            need = chunk.needs[index]
            by = need.prepared_by
            jobs = {stage: f"{array}_{index}" for stage, array in arrays.items() if stage in chunk.stages}
            of = dict.fromkeys(jobs, nonce)
            if by and (job := need.prepare or prepares.get(by)):
                jobs["prepare"] = job
                of["prepare"] = nonces.get(by) or str(state.submission(RunDir(by), "prepare")["nonce"])
            if jobs:
                if self.image:
                    jobs["image"], of["image"] = self.image, ""
                _record(RunDir(need.run), jobs, of, automatic=need.automatic, prepared_by=by.name if by else None)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(record, chunk.needs))
        events.append(self.sweep.events, events.submit_writer(), "submitted", nonce=nonce)

    def _variables(self, plan: RunPlan, stage: str) -> dict[str, str]:
        """The environment of a stage, but for its run."""
        hf = modelfiles.hf_home(self.cache)
        found = batch.environment(self.profile, plan, stage, run=Path(), cache=self.cache, hf=hf, python=self.python)
        return {name: value for name, value in found.items() if name != "FT_RUN"}

    def queue_feeder(self, queue: list[client.Job], plan: RunPlan) -> None:
        """A job that runs when an array had bad ends, or when there is room for the rest; the last one goes."""
        comment = f"ftlib {self.sweep.name} {FEEDER}"
        client.cancel(
            job.id for job in queue if job.comment == comment and state.SLURM_STATES.get(job.state) == "queued"
        )
        arrays = sorted(set().union(*self.active.values()))
        words = [f"afternotok:{array}" for array in arrays]
        if self.fed.waiting:
            words += [f"afterany:{job}" for job in self.middle or arrays]
        if not words and not self.fed.waiting:
            return
        made = ModuleExecutor(self.sweep.path / FEEDER, python=shlex.quote(self.python))
        made.folder.mkdir(exist_ok=True)
        made.module = f"jobs.feeder {shlex.quote(str(self.sweep.path))}"
        parameters = batch.small_parameters(
            self.profile,
            name=f"{self.sweep.name}.{FEEDER}",
            setup=batch.enter(self.profile, self._variables(plan, "prepare"), self.sweep.code),
            comment=comment,
            dependency="?".join(words) or None,
        )
        if not words:
            parameters["additional_parameters"]["begin"] = f"now+{LOOK_AGAIN_MIN}minutes"
        made.update_parameters(**parameters)
        made.queue("the feeder")


def cancel(sweep: SweepDir) -> int:
    """End every job of the sweep, the feeder first; returns how many points had any."""
    profile = sweep.read().profile
    assert profile.scheduler
    client.use(profile.scheduler.slurm_conf)
    queue = client.jobs()
    view: View = {job.id: (job.state, job.reason) for job in queue}
    mine = {job.id for job in queue if active(view, job.id)}
    client.cancel(job.id for job in queue if job.id in mine and job.comment == f"ftlib {sweep.name} {FEEDER}")
    arrays: set[str] = set()

    def note(run: RunDir) -> bool:
        jobs = {stage: job for stage, job in state.submissions(run).items() if job in mine}
        arrays.update(job.partition("_")[0] for job in jobs.values())
        user = os.environ.get("USER")
        rows: list[tuple[events.Name, dict[str, object]]]
        rows = [("cancelled", {"stage": stage, "job_id": job, "user": user}) for stage, job in jobs.items()]
        if rows:
            events.append_all(run.events, events.submit_writer(), rows)
        return bool(rows)

    with ThreadPoolExecutor(THREADS) as pool:
        count = sum(pool.map(note, sweep.members()))
    client.cancel(sorted(arrays, reverse=True))
    return count
