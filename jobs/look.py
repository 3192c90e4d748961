"""Commands that look and change nothing: status, why, verify, layers. One question to each cluster's scheduler."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import getpass
import hashlib
import json
import pwd
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ftlib import claim, modelfiles, recipe, rundir, state, sweepdir
from ftlib.errors import DONE, InputError, Unreadable
from ftlib.report.board import board
from ftlib.report.plan import console
from ftlib.report.status import UNREADABLE, Row, Seen, SweepRow, row, sweep_row
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import decide
from ftlib.runs.events import Moved
from ftlib.runs.ledger import Ledger
from ftlib.runs.scheduler import SchedulerView
from ftlib.slurm import client, queue
from ftlib.slurm.client import Job
from ftlib.slurm.queue import UNKNOWN, Answer
from ftlib.state import ACTIVE, StageState
from jobs import wish as wishes
from jobs.wish import RUNS

REDRAW_S = 2.0


def look(runs: Iterable[RunDir]) -> dict[str, dict[str, StageState]]:
    """Every run's stages, now; none of those whose folders are unreadable."""
    return {seen.run.name: seen.stages for seen in see(runs)}


def see_one(run: RunDir, *, fresh: bool = True) -> Seen:
    """`see` of one run. Unreadable where its folder is damaged."""
    (seen,) = see([run], fresh=fresh)
    if seen.unreadable:
        raise Unreadable(seen.unreadable)
    return seen


def see(runs: Iterable[RunDir], *, fresh: bool = True) -> list[Seen]:
    """Every run, with one question to each cluster's scheduler.

    Without `fresh` an answer as old as the site's least poll interval will do, and one that does not come is no error.
    A run whose folder is damaged has no stages, and says so in `unreadable`.
    """
    by_cluster: dict[str | None, list[tuple[Seen, dict[str, Any]]]] = defaultdict(list)
    found, me = [], getpass.getuser()
    for run in runs:
        try:
            seen, provenance = _read(run, me)
        except Unreadable as error:
            found.append(Seen(run, Ledger(), "here", [], unreadable=str(error)))
            continue
        found.append(seen)
        site = provenance["profile"].get("scheduler")
        if site is not None:
            by_cluster[site.get("slurm_conf")].append((seen, provenance))
    for conf, members in by_cluster.items():
        jobs = {job for seen, _ in members for stage, job in seen.known.jobs.items()
                if stage in STAGES and not seen.known.done(stage)}  # fmt: skip
        answer = Answer({})
        if jobs:
            client.use(conf)
            least_s = max(said["profile"]["scheduler"].get("poll_interval_s", 0) for _, said in members)
            owners = {str(user) for _, said in members if (user := said.get("user"))}
            users = {user for user in owners if user == me or _has_account(user)}
            users = users if users - {me} else set()
            answer = queue.ask(jobs, users=users, kept=None if fresh else kept_answer(conf), least_s=least_s)
        view, now = answer.view(), time.time()
        for seen, said in members:
            owner = said.get("user") or me
            seen.answer = answer if owner == me or _has_account(owner) else _without_account(seen, answer, owner)
            seen_by_slurm = view if seen.answer is answer else seen.answer.view()
            if seen.place == "here" and _job_has_ended(seen, seen_by_slurm):
                # It may have ended after its folder was read, and left its outcome there before Slurm was asked.
                with contextlib.suppress(Unreadable):
                    seen.known = seen.run.ledger()
            seen.stages = state.stages(seen.known, seen.answer.jobs)
            seen.action = decide.next_action(seen.known, seen_by_slurm, now)
    return found


def _job_has_ended(seen: Seen, view: SchedulerView) -> bool:
    """Whether the job of a stage that is not done, as far as its folder was read, runs no more."""
    stage = seen.known.first_open
    job = seen.known.jobs.get(stage) if stage else None
    return job is not None and view.job(job).state != "" and not view.active(job)


def _read(run: RunDir, me: str) -> tuple[Seen, dict[str, Any]]:
    """What a run's folder tells, and its provenance. Unreadable where one of its files is damaged."""
    with rundir.reading(run.path):
        known = run.ledger()
    provenance = run.provenance()
    with rundir.reading(run.provenance_file):
        place, words = state.elsewhere(run, known, provenance)
        if place == "copy":  # it will be at home here once it is resumed, and has no jobs of its own
            known = known.with_events(Moved(to=str(run.path)))
        notes = [words] if words and not all(map(known.done, STAGES)) else []
        if (user := provenance.get("user")) and user != me:
            notes.append(f"it belongs to {user}")
        seen = Seen(run, known, place, notes)
        if provenance["profile"].get("scheduler") is None:
            alive = place != "copy" and writer(run) is not None
            seen.stages = state.stages(known, None, alive=alive)
    return seen, provenance


@functools.cache
def _has_account(user: str) -> bool:
    """Whether this machine knows a user of that name. One name at a time: many sites list no users."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _without_account(seen: Seen, answer: Answer, owner: str) -> Answer:
    """The answer for a run whose owner squeue cannot be asked for: a job that it does not list may be at work."""
    seen.notes.append(f"there is no user {owner} on this machine: squeue cannot be asked for their jobs")
    mine = {job for stage, job in seen.known.jobs.items() if stage in STAGES}
    hidden = {job: Job(UNKNOWN) for job in mine if answer.jobs.get(job, Job("")).state == ""}
    return answer._replace(jobs={**answer.jobs, **hidden})


def kept_answer(slurm_conf: str | None) -> Path:
    """Where the last answer of a cluster's scheduler to this person is kept."""
    which = hashlib.sha256((slurm_conf or "").encode()).hexdigest()[:8]
    return RUNS / f".queue-{getpass.getuser()}-{which}.json"


# -- status ------------------------------------------------------------------------------------------------------------


def status(options: argparse.Namespace) -> int:
    """Print every sweep and run, or one; with --watch until nothing of it is queued or running."""
    if options.watch:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(options)
    else:
        _tell(*_rows(options), as_json=options.json)
    return DONE


def _watch(options: argparse.Namespace) -> None:
    from rich.live import Live

    out, before = console(), None
    drawn = out.is_terminal and not options.json
    with Live(console=out, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            rows, sweeps, seen = _rows(options)
            if drawn:
                # What is at work stands first: a screen has no room for all.
                rows.sort(key=lambda one: one.state not in ACTIVE)
                live.update(_board(rows, sweeps, seen, out.width), refresh=True)
            # What is worth another line in a log: steps and losses alone would fill it.
            now = [(one.run, one.state, one.stage, one.lives, one.words) for one in rows]
            ends = now, [(one.sweep, one.states, one.lives) for one in sweeps]
            if not drawn and ends != before:
                _tell(rows, sweeps, seen, as_json=options.json)
            before = ends
            if not ({one.state for one in rows} | {one.state for one in sweeps}) & {*ACTIVE}:
                return
            time.sleep(REDRAW_S)


def _rows(options: argparse.Namespace) -> tuple[list[Row], list[SweepRow], list[Seen]]:
    """What to show: one run; one sweep with its runs; or all sweeps, each in a line, and the other runs."""
    gc.disable()  # It would walk over what was read, again and again: a third of the time where runs are thousands.
    if options.run:
        chosen, sweeps = [rundir.find(RUNS, options.run)], []
    elif options.sweep:
        sweeps = [sweepdir.find(RUNS, options.sweep)]
        chosen = sweeps[0].members()
    else:
        chosen, sweeps = rundir.every(RUNS), sweepdir.every(RUNS)
    seen, now = see(chosen, fresh=False), datetime.datetime.now(datetime.timezone.utc)
    gc.enable()
    by_name = {one.run.name: one for one in seen}
    lines, collapsed = [], set[str]()
    for sweep in sweeps:
        try:
            points = sweep.read().points
        except InputError as error:
            lines.append(SweepRow(sweep=sweep.name, state=UNREADABLE, words=str(error)))
            continue
        lines.append(sweep_row(sweep.name, [by_name[run] for run in points if run in by_name], now))
        collapsed |= set() if options.sweep else points.keys()
    return [row(one, now) for one in seen if one.run.name not in collapsed], lines, seen


def _tell(rows: list[Row], sweeps: list[SweepRow], seen: list[Seen], *, as_json: bool) -> None:
    if as_json:
        value = {
            "asked": min((one.answer.asked for one in seen if one.answer.asked), default=None),
            "trouble": next((one.answer.trouble for one in seen if one.answer.trouble), ""),
            "runs": [dataclasses.asdict(one) for one in rows],
            "sweeps": [dataclasses.asdict(one) for one in sweeps],
        }
        print(json.dumps(value, indent=1), flush=True)
    elif rows or sweeps:
        out = console()
        out.print(_board(rows, sweeps, seen, out.width))
    else:
        print("No runs yet. `make submit` makes one.")


def _board(rows: list[Row], sweeps: list[SweepRow], seen: list[Seen], width: int) -> RenderableType:
    oldest = min((one.answer for one in seen if one.answer.jobs), key=lambda answer: answer.asked, default=Answer({}))
    return board(rows, sweeps, oldest, width=width)


# -- why, verify -------------------------------------------------------------------------------------------------------


def why(options: argparse.Namespace) -> int:
    """Print what happened in each life of a run, and what to do now."""
    from ftlib.report.why import print_why

    seen = see_one(rundir.find(RUNS, options.run), fresh=False)
    with rundir.reading(seen.run.path):
        print_why(seen, console())
    return DONE


def verify(options: argparse.Namespace) -> int:
    """Check every checkpoint of a run; 1 when one is damaged."""
    from ftlib.report.why import print_verify

    return DONE if print_verify(rundir.find(RUNS, options.run), console()) else 1


def writer(run: RunDir) -> int | None:
    """Process id of the foreground process that works on the run on this machine."""
    owner = claim.read(run.path)
    return owner.pid if owner is not None and owner.works_here() else None


# -- layers ------------------------------------------------------------------------------------------------------------


def layers(options: argparse.Namespace) -> int:
    """Print the names, shapes and sizes of all that could be trained, from the model's config alone."""
    from rich import box
    from rich.table import Table

    from ftlib.plan import architectures

    changes, cluster_changes = recipe.parse_set(options.set)
    model = recipe.load(wishes.RECIPES, options.model, changes).model
    cache = wishes.load_profile(options.cluster, cluster_changes).cache_dir(wishes.CHECKOUT)
    # Nothing is fetched: whether nodes have internet does not matter here.
    files = modelfiles.locate(model.name, model.revision, checkout=wishes.CHECKOUT, cache=cache, internet=True)
    found = architectures.parameters(files.config, model.name)
    rows = [
        # The name with its range of blocks, as a pattern selects it.
        {"name": p.name.replace(architectures.BLOCK, f"0-{p.copies - 1}" if p.copies > 1 else "0"),
         "shape": list(p.shape), "kind": p.kind, "copies": p.copies, "parameters": p.size * p.copies}
        for p in found
    ]  # fmt: skip
    if options.json:
        print(json.dumps({"model": model.name, "parameters": rows}, indent=1))
        return DONE
    table = Table(title=model.name, box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("parameter", "all", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("kind")
    table.add_column("parameters", f"{sum(p.size * p.copies for p in found):,}", justify="right")
    for p, one in zip(found, rows, strict=True):
        table.add_row(str(one["name"]), " × ".join(map(str, p.shape)), p.kind, f"{one['parameters']:,}")
    out = console()
    out.print(table)
    linear = ", ".join(sorted({p.layer.rpartition(".")[2] for p in found if p.kind == "linear"}))
    out.print(f"Adapters can go on the linear layers: method.targets=[{linear}] or all-linear.", markup=False)
    if not any(p.kind == "head" for p in found):
        out.print("The head is the embedding itself (tied): no layer of its own.")
    return DONE
