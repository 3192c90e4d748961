"""`sweep`, and `cancel`, `resume` and `report` of one: many runs from one file, each a run like any other."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import operator
import os
import shlex
import sys
from collections.abc import Iterable, Sequence

from ftlib import atomic, naming, rundir, state, sweepdir
from ftlib import sweep as sweeps
from ftlib.errors import DONE, RUN_AGAIN, InputError, Unavailable
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.sweep import SweepSpec
from ftlib.sweepdir import FOLDER, Sweep, SweepDir
from jobs import changes, fetch, submit
from jobs import wish as wishes
from jobs.placement import Placement
from jobs.points import Asker, Need, need, share_datasets, threaded
from jobs.wish import RUNS, Wish


def sweep(options: argparse.Namespace) -> int:
    """Queue the points that are missing or failed, or run them here one after the other."""
    spec = sweeps.load(wishes.SWEEPS, options.sweep)
    points, known = _points(options, spec)
    first = next(iter(points.values()))
    place = SweepDir(RUNS / FOLDER / f"{options.sweep}-{first.spec.recipe}-{_hash(first)}")
    _print_summary(place.name, spec, points, len(known))
    # The swept fields' values as the recipe has them; those that the point leaves as they are, too.
    values = {name: wish.spec.model_dump(mode="json") for name, wish in points.items()}
    fields = {name: {field: functools.reduce(operator.getitem, field.split("."), of) for field in spec.fields}
              for name, of in values.items()}  # fmt: skip
    said = {"SWEEP": options.sweep, **first.words}
    asked = Sweep(spec=spec, said=said, points=fields, profile=first.profile, cache=first.cache)
    before = place.read() if place.file.exists() else None
    if before and (before.spec, before.points) != (asked.spec, asked.points):
        _print_difference(before, asked)
    if options.dry_run:
        return _dry_run(place, spec, {name: wish for name, wish in points.items() if name not in known})
    submit.check_ready(first)
    new = [wish for name, wish in points.items() if name not in known]
    if new:
        fetch.require_access(new)
        need = _space_needed(new)
        submit.require_space(need, f"the {len(new)} new runs of {place.name}", new=new)
    place.path.mkdir(parents=True, exist_ok=True)
    with place.claim():
        _make_runs(place, points)
        place.write(asked)
        threaded(lambda name: changes.follow(RunDir(RUNS / name), first.profile, options.set, {}), known)
        return _go(place, by="sweep")


def resume(options: argparse.Namespace) -> int:
    """Queue what is missing of a sweep, what was cancelled, too."""
    place = sweepdir.find(RUNS, options.sweep)
    with place.claim():
        return _go(place, by="resume")


def cancel(options: argparse.Namespace) -> int:
    """End every job of a sweep."""
    place = sweepdir.find(RUNS, options.sweep)
    site = place.read().profile.scheduler
    if site is None:
        raise InputError(f"{place.name} runs in the foreground of the terminal that began it; Ctrl-C there saves it")
    from jobs import feeder
    from jobs.look import kept_answer

    with place.claim():
        count = feeder.cancel(place)
    kept_answer(site.slurm_conf).unlink(missing_ok=True)
    print(f"{place.name}: cancelled {count} points." if count else f"{place.name}: nothing is queued or running.")
    if count:
        print(f"make resume SWEEP={place.name} would go on.")
    return DONE


def report(options: argparse.Namespace) -> int:
    """Print the points by their score; write the table as CSV and the plot as PNG and SVG."""
    from ftlib.report import sweep as pages
    from jobs.look import look

    place = sweepdir.find(RUNS, options.sweep)
    members = place.members()
    undone = [run for run in members if not os.path.exists(run.evaluation_file)]
    try:
        found = look(undone)
    except Unavailable as error:
        print(f"The scheduler does not answer, so the others' states are not known: {error}", file=sys.stderr)
        found = {}
    rows = pages.rows(place, found)
    if options.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
        return DONE
    pages.print_rows(place, rows)
    pages.write_csv(place.csv_file, rows)
    drawn = pages.draw(place, rows)
    for file in [place.csv_file, *drawn]:
        print(os.path.relpath(file))
    return DONE


def _points(options: argparse.Namespace, spec: SweepSpec) -> tuple[dict[str, Wish], list[str]]:
    """Each point by its run's name, and the names of those that have a run already; InputError when they are too many
    or any is wrong."""

    def make(points: tuple[sweeps.Point, ...]) -> list[Wish]:
        return wishes.make_all(
            model=options.model, data=options.data, cluster=options.cluster, settings=options.set, points=points,
            adapters_only=True,
        )  # fmt: skip

    # Before thousands are made: whether there may be so many, and whether the first is right.
    if (count := spec.count()) > 100:
        one: dict[str, object] = {"grid": spec.grid and {field: values[:1] for field, values in spec.grid.items()}}
        one["random"] = spec.random and spec.random.model_copy(update={"points": 1})
        (first,) = make(spec.model_copy(update=one).points()[:1])
        most = first.profile.scheduler.max_points if first.profile.scheduler else 10_000
        if count > most:
            hours, minutes = first.plan.gpu_hours, _minutes(first)
            cost = f", about {hours * count:,.0f} GPU-hours" if hours else ""
            time = f" and {minutes * count / 1440:,.0f} days of work, one after the other" if minutes else ""
            raise InputError(
                f"sweep {options.sweep}: {count:,} points ({_product(spec)}){cost}{time}; cluster {first.profile.name} "
                f"allows {most:,} (scheduler.max_points). Take fewer values, or random with so many points"
            )
    made = make(spec.points())
    named, known = _named(made)
    if len(named) < len(made):
        print(f"{len(made) - len(named)} of the {len(made)} points are the same run as another; each is run once.")
    return named, known


def _named(points: Sequence[Wish]) -> tuple[dict[str, Wish], list[str]]:
    """The points by their runs' names, and the names of those that have a run already. Points with equal settings are
    one run; of two whose hashes are equal by chance, or whose folder holds another run, one has a suffix."""
    distinct = list({point.request.identity: point for point in points}.values())
    by_name: dict[str, Wish] = {}
    known: list[str] = []
    for point, chosen in zip(distinct, threaded(lambda one: naming.choose(RUNS, one.request), distinct), strict=True):
        if chosen.name in by_name:
            chosen = naming.choose(RUNS, point.request, taken=by_name)
        if chosen.message:
            print(chosen.message)
        by_name[chosen.name] = point
        if chosen.exists:
            known.append(chosen.name)
    return by_name, known


def _product(spec: SweepSpec) -> str:
    if spec.grid is not None:
        return " × ".join(f"{len(values)} {field}" for field, values in spec.grid.items())
    return f"{'random' if spec.random else 'listed'} over {', '.join(spec.fields)}"


def _minutes(wish: Wish) -> float:
    return sum(stage.estimate_min or 0 for stage in wish.plan.stages.values())


def _space_needed(points: Iterable[Wish]) -> int:
    """Bytes that the points' runs write, with some to spare once."""
    return sum(submit.space_needed(wish) - submit.SPARE_BYTES for wish in points) + submit.SPARE_BYTES


def _gpus_at_once(spec: SweepSpec, points: list[Wish]) -> int:
    """The most GPUs (simulated ones included) that the points hold at one moment, were all of them free.

    at_once bounds the points in each job of the chain; the site's max_jobs bounds them all.
    """
    site = points[0].profile.scheduler
    waiting = min(len(points), site.max_jobs) if site and site.max_jobs else len(points)
    most = 0
    # Points of one sweep differ little in what they ask for: each counts as the most demanding.
    requests: dict[tuple[str, ...], int] = {}
    for wish in points:
        for stages in wish.plan.jobs:
            asked = wish.plan.request(stages)
            requests[stages] = max(requests.get(stages, 0), asked.nodes * asked.gpus_per_node)
    for gpus in sorted(requests.values(), reverse=True):
        running = min(waiting, spec.at_once or waiting)
        most += running * gpus
        waiting -= running
    return most


def _hash(wish: Wish) -> str:
    """Of the words that the sweep was asked with; the file's content may change and it is still the same sweep."""
    words = {**wish.words, "SET": sorted(shlex.split(wish.words.get("SET", "")))}
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:8]


def _print_summary(name: str, spec: SweepSpec, points: dict[str, Wish], known: int) -> None:
    wish = next(iter(points.values()))
    datasets = {w.dataset for w in points.values()}
    print(f"Sweep {name}: {spec.description}" if spec.description else f"Sweep {name}")
    print(f"  {len(points):,} points ({_product(spec)}), {len(datasets):,} dataset{'s' * (len(datasets) > 1)}")
    hours, minutes = sum(w.plan.gpu_hours or 0 for w in points.values()), sum(map(_minutes, points.values()))
    unknown = any(w.plan.gpu and w.plan.gpu_hours is None for w in points.values())
    cost = "cost unknown; " if unknown else f"about {hours:,.1f} GPU-hours; " if hours else ""
    longest = max(map(_minutes, points.values()))
    print(f"  {cost}about {minutes / 60:,.1f} h of work, the longest point {longest:,.0f} min")
    site = wish.profile.scheduler
    if site and (gpus := _gpus_at_once(spec, list(points.values()))):
        cap = f"at_once: {spec.at_once}" if spec.at_once else "at_once in the sweep's file bounds it"
        print(f"  holds up to {gpus:,} GPU{'s' * (gpus > 1)} at once ({cap})")
    lean = sum(not w.spec.export.merged and w.spec.method.adapts for w in points.values())
    words = "; adapters alone are exported, SET=\"export.merged=true\" merges each" if lean else ""
    print(f"  takes up to {_space_needed(points.values()) / 2**30:,.1f} GiB on disk{words}")
    if site and site.max_jobs:
        print(f"  the site allows {site.max_jobs:,} jobs at once; what does not fit is queued as room comes")
    if known:
        print(f"  {known:,} have a run already; it counts")


def _print_difference(before: Sweep, now: Sweep) -> None:
    added, gone = now.points.keys() - before.points.keys(), before.points.keys() - now.points.keys()
    print("The sweep's file has changed since it was last submitted:")
    print(f"  {len(added)} points are new, {len(gone)} are no longer in it, {len(now.points) - len(added)} stay")
    for name in sorted(gone)[:5]:
        print(f"  gone: {sweeps.words(before.points[name])} (its run stays: {name})")
    for field in ("metric", "at_once"):
        if (old := getattr(before.spec, field)) != (new := getattr(now.spec, field)):
            print(f"  {field}: {old} -> {new}")


def _make_runs(place: SweepDir, points: dict[str, Wish]) -> None:
    """The points' run folders, those that are missing; they share one snapshot of the code."""
    code = rundir.snapshot(RUNS, wishes.SNAPSHOT)
    temporary = atomic.temporary_beside(place.code)
    temporary.symlink_to(os.path.relpath(code, place.path))
    os.replace(temporary, place.code)

    missing = [name for name in points if not (RUNS / name).exists()]
    threaded(lambda n: rundir.create(RUNS, n, wishes.files_of(points[n], n, sweep=place.name), code), missing)


def _go(place: SweepDir, *, by: Asker) -> int:
    profile = place.read().profile
    if not place.members():
        raise InputError(f"{place.name}: none of its runs is in {RUNS} any more; make sweep makes them again")
    if profile.scheduler is None:
        return _run_here(place, profile)
    from jobs import feeder

    print(feeder.feed(place, by=by).words())
    print(f"Watch it: make status   make report SWEEP={place.name}")
    return DONE


def _run_here(place: SweepDir, profile: ClusterProfile) -> int:
    """Each point to its end, one after the other; a failed one does not stop the rest, Ctrl-C does."""
    from jobs import local

    members, points, failed = place.members(), place.read().points, dict[str, int]()
    unfinished = [(run, ledger) for run in members if (ledger := run.ledger()).first_open is not None]
    share_datasets(place, [need(run, ledger, state.stages(ledger, {})) for run, ledger in unfinished], {})
    for number, run in enumerate(members, 1):
        print(f"\n== point {number} of {len(members)}: {sweeps.words(points[run.name])} ({run.name})", flush=True)
        if all(run.stage_done(stage) for stage in STAGES):
            print("completed before", flush=True)
            continue
        with run.claim():
            code = local.run_stages(run)
        if code == RUN_AGAIN:
            return code
        if code != DONE:
            failed[run.name] = code
    print(f"\n{len(members) - len(failed)} of {len(members)} points are completed. make report SWEEP={place.name}")
    print(*(f"  failed: make why RUN={name}\n" for name in failed), sep="", end="")
    return next(iter(failed.values()), DONE)


def _dry_run(place: SweepDir, spec: SweepSpec, new: dict[str, Wish]) -> int:
    first = next(iter(new.values()), None)
    if first is None or first.profile.scheduler is None:
        print("Every point has a run." if first is None else "Without Slurm the points run here, one after the other.")
        return DONE
    from ftlib.slurm import client
    from jobs import arrays

    client.use(first.profile.scheduler.slurm_conf)
    seen: set[str] = set()
    needs = []
    for name, wish in new.items():
        where = Placement.first(wish.profile, wish.plan)
        needs.append(Need(RUNS / name, STAGES[wish.dataset in seen :], wish.dataset, where=where))
        seen.add(wish.dataset)
    submit.show(arrays.preview(place, first.profile, needs, spec.at_once, first.cache))
    return DONE
