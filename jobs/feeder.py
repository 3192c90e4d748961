"""Queue what the points of a sweep need and its site has room for. The feeder is a job of seconds that does so again,
when an array had bad ends or there is room: python -m jobs.feeder runs/sweeps/<sweep>
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path

from ftlib import claim, state
from ftlib.errors import FtError, InputError, Unreadable
from ftlib.plan.plan import RunPlan
from ftlib.rundir import RunDir, reading
from ftlib.runs import comments, events
from ftlib.runs.decide import Action
from ftlib.runs.events import Cancelled, Intended, Submitted
from ftlib.runs.ledger import ARRAYS, Ledger
from ftlib.slurm import batch, client, retry
from ftlib.slurm import queue as slurm_queue
from ftlib.sweepdir import SweepDir
from jobs import image, placement
from jobs.arrays import Arrays, Fed, record
from jobs.chain import ModuleExecutor
from jobs.points import Asker, Need, active, fitting, need_of, placed, share_datasets, threaded

FEEDER = "feeder"
# When nothing of the sweep is queued, nothing can call the feeder: it looks again after so long.
LOOK_AGAIN_MIN = 10


def feed(sweep: SweepDir, *, by: Asker) -> Fed:
    """Queue what is missing and fits; see `points.need_of` for `by`. Must be called under `sweep.claim()`."""
    kept = sweep.read()
    profile = kept.profile
    assert profile.scheduler
    client.use(profile.scheduler.slurm_conf)
    patience_s = retry.RECOVERY_S if by == "feeder" else 0.0
    queue = retry.patiently(client.jobs, patience_s=patience_s)
    _adopt(sweep, queue)
    runs = sweep.members()
    view = {job.id: job for job in queue}
    used = sum(active(view, job.id) for job in queue)
    fed, needs, decided = Fed(), list[Need](), dict[Path, Action]()
    runs, ledgers = _readable(runs, fed)
    answer = slurm_queue.combine(sorted({job for known in ledgers for job in known.jobs.values()}), view, time.time())
    view, seen_by_slurm = answer.jobs, answer.view()
    for run, known in zip(runs, ledgers, strict=True):
        try:
            found = need_of(run, known, seen_by_slurm, by=by, decided=decided)
        except Unreadable as error:
            found = str(error)
        if isinstance(found, Need):
            needs.append(found)
        else:
            fed.told.setdefault(found, []).append(run.name)
    seen = {run.path: known for run, known in zip(runs, ledgers, strict=True)}
    needs, not_placed = placed(needs, seen)
    for why, names in not_placed.items():
        fed.told.setdefault(why, []).extend(names)
    most = profile.scheduler.max_jobs
    now = fitting(needs, float("inf") if most is None else most - used - 1)  # one for the feeder
    fed.waiting = len(needs) - len(now)
    if answer.trouble:
        print(f"ftlib: {answer.trouble}", file=sys.stderr)
    feeding = Arrays(sweep, profile, fed, kept.spec.at_once, kept.cache)
    feeding.patience_s = retry.RECOVERY_S if by == "feeder" else retry.SUBMIT_S
    if now:
        feeding.image = image.job_before(profile, sweep.runs.parent, patience_s=feeding.patience_s)
    for known in ledgers:
        for stage, job in known.jobs.items():
            if active(view, job):
                feeding.active.setdefault(stage, set()).add(job.partition("_")[0])
    with contextlib.ExitStack() as held:
        mine = [need for need in now if _claimed(need, seen[need.run], held, by=by)]
        if len(mine) < len(now):
            fed.told["another process is queueing it"] = [n.run.name for n in now if n not in mine]
        behind = [job for need in mine for job in need.behind]
        retry.patiently(lambda: client.cancel(behind), patience_s=patience_s)
        refused = feeding.queue(share_datasets(sweep, mine, view))
    if (plan := _any_plan(needs, runs)) is not None:
        _queue_feeder(feeding, queue, plan)
    if refused:
        raise refused
    return fed


def _readable(runs: list[RunDir], fed: Fed) -> tuple[list[RunDir], list[Ledger]]:
    """The runs whose folders can be read, with their ledgers; the others are written down in `fed`."""

    def read(run: RunDir) -> Ledger | Unreadable:
        try:
            with reading(run.path):
                return run.ledger()
        except Unreadable as error:
            return error

    known: list[tuple[RunDir, Ledger]] = []
    for run, ledger in zip(runs, threaded(read, runs), strict=True):
        if isinstance(ledger, Unreadable):
            fed.told.setdefault(str(ledger), []).append(run.name)
        else:
            known.append((run, ledger))
    return [run for run, _ in known], [ledger for _, ledger in known]


def _any_plan(needs: list[Need], runs: list[RunDir]) -> RunPlan | None:
    """The plan of the first run that can be placed: the sweep controller's job takes its threads."""
    if needs:
        return needs[0].plan
    for run in runs:
        with contextlib.suppress(InputError):
            return placement.of(run).plan
    return None


def _claimed(need: Need, known: Ledger, held: contextlib.ExitStack, *, by: Asker) -> bool:
    """Whether the point is ours to queue: nobody else is at it, or was since its ledger was the one `known`."""
    run = RunDir(need.run)
    wait_s, silent_s = (claim.SILENT_S, claim.SILENT_S) if by == "feeder" else (0.0, None)
    try:
        held.enter_context(run.claim(wait_s=wait_s, silent_s=silent_s))
    except InputError:
        return False
    if run.ledger().of(Submitted) != known.of(Submitted):
        return False
    if need.decision:
        run.record(*need.decision)
    return True


def _adopt(sweep: SweepDir, queue: list[client.Job]) -> None:
    """Take in arrays whose submit was killed before it wrote down their ids: the comment holds the intent's nonce."""
    known = events.read(sweep.events)
    answered = {event.nonce for event in known if isinstance(event, Submitted)}
    open_intents = [event.nonce for event in known if isinstance(event, Intended) and event.nonce not in answered]
    for nonce in open_intents:
        found: dict[str, dict[str, str]] = {}  # index -> stage -> job
        for job in queue:
            comment = comments.parse(job.comment)
            if comment and comment.nonce == nonce:
                found.setdefault(job.id.partition("_")[2], {}).update(dict.fromkeys(comment.stages, job.id))
        runs = {
            index: RunDir(sweep.runs / os.readlink(sweep.arrays / nonce / index).rpartition("/")[2]) for index in found
        }
        # The job that prepares a dataset is recorded for all of its points before what waits for it.
        for index, jobs in found.items():
            for sibling in runs[index].siblings() if "prepare" in jobs else ():
                record(sibling, {"prepare": jobs["prepare"]}, {"prepare": nonce}, prepared_by=runs[index].name)
        for index, jobs in found.items():
            record(runs[index], jobs, dict.fromkeys(jobs, nonce))
        events.append(sweep.events, events.submit_writer(), Submitted(stage=ARRAYS, job_id="", nonce=nonce))


def _queue_feeder(fed: Arrays, queue: list[client.Job], plan: RunPlan) -> None:
    """A job that runs when an array had bad ends, or when there is room for the rest; the last one goes."""
    comment = comments.shared(fed.sweep.name, FEEDER)
    feeders = [job for job in queue if job.comment == comment]
    client.cancel(job.id for job in feeders if state.SLURM_STATES.get(job.state) == "queued")
    arrays = sorted(set().union(*fed.active.values()))
    words = [f"afternotok:{array}" for array in arrays]
    if fed.fed.waiting:
        words += [f"afterany:{job}" for job in fed.middle or arrays]
    if not words and not fed.fed.waiting:
        return
    variables = batch.environment(fed.profile, plan, "prepare", run=None, cache=fed.cache)
    python, module = shlex.quote(variables["FT_PYTHON"]), f"jobs.feeder {shlex.quote(str(fed.sweep.path))}"
    made = ModuleExecutor(fed.sweep.path / FEEDER, python=python, module=module)
    setup = batch.enter(fed.profile, variables, fed.sweep.code)
    parameters = batch.small_parameters(
        fed.profile, name=f"{fed.sweep.name}.{FEEDER}", setup=setup, comment=comment, dependency="?".join(words) or None
    )
    if not words:
        parameters["additional_parameters"]["begin"] = f"now+{LOOK_AGAIN_MIN}minutes"
    made.update_parameters(**parameters)
    made.queue("the feeder", patience_s=fed.patience_s, before=[job.id for job in feeders])


def cancel(sweep: SweepDir) -> int:
    """End every job of the sweep, the feeder first; returns how many points had any."""
    profile = sweep.read().profile
    assert profile.scheduler
    client.use(profile.scheduler.slurm_conf)
    queue = client.jobs()
    mine = {job.id for job in queue if state.SLURM_STATES.get(job.state) in state.ACTIVE}
    comment = comments.shared(sweep.name, FEEDER)
    client.cancel(job.id for job in queue if job.id in mine and job.comment == comment)
    arrays: set[str] = set()

    def note(run: RunDir) -> bool:
        try:
            with reading(run.path):
                jobs = {stage: job for stage, job in run.ledger().jobs.items() if job in mine}
        except Unreadable as error:
            print(f"ftlib: {error}. Its jobs go with their arrays", file=sys.stderr)
            return False
        arrays.update(job.partition("_")[0] for job in jobs.values())
        user = os.environ.get("USER")
        if jobs:
            run.record(*(Cancelled(stage=stage, job_id=job, user=user) for stage, job in jobs.items()))
        return bool(jobs)

    count = sum(threaded(note, sweep.members()))
    client.cancel(sorted(arrays, reverse=True))
    return count


def main(folder: str) -> int:
    """What the feeder's job runs; prints what it did."""
    sweep = SweepDir(Path(folder))
    try:
        with sweep.claim(wait_s=claim.SILENT_S, silent_s=claim.SILENT_S):
            print(feed(sweep, by="feeder").words(), flush=True)
    except FtError as error:
        print(f"ftlib: {error}. make sweep again queues what is missing", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
