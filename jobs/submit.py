"""`submit` and `plan`: from a wish to queued jobs, or to the words that say what they would be."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence

from ftlib import atomic, naming, rundir
from ftlib.errors import InputError
from ftlib.plan import memory, shapes
from ftlib.report.plan import print_plan
from ftlib.slurm import client
from jobs import environment, fetch, quota, runs
from jobs import wish as wishes
from jobs.wish import RUNS, Wish

# Checkpoints, the dataset and logs of a run beside its exported weights.
SPARE_BYTES = 200 * 2**20


def plan(options: argparse.Namespace) -> int:
    """Print the plan, as a table or as JSON."""
    wish = wishes.asked(options)
    name = naming.choose(RUNS, wish.request).name
    if options.json:
        print(json.dumps({"run": name, **wish.plan.model_dump(mode="json")}, indent=1))
    else:
        print_plan(name, wish.spec, wish.plan, queued=wish.profile.scheduler is not None)
    return 0


def submit(options: argparse.Namespace) -> int:
    """Queue the wish's run, or say that it is there already."""
    wish = wishes.asked(options)
    chosen = naming.choose(RUNS, wish.request, new=options.new)
    name = chosen.name
    if chosen.message:
        print(chosen.message)
    if options.dry_run:
        return _dry_run(wish, name)
    check_ready(wish)
    if not chosen.exists:
        fetch.require_access([wish])
        print_plan(name, wish.spec, wish.plan, queued=wish.profile.scheduler is not None)
        require_space(space_needed(wish), f"run {name}", new=[wish])
    run = rundir.create(RUNS, name, wishes.files_of(wish, name), wishes.SNAPSHOT)
    if chosen.exists:
        print(f"Identical settings were submitted before: run {name}. (NEW=1 makes another run.)")
        return runs.submit_again(run, wish.profile, wish.words.get("SET", ""))
    return runs.start(run, wish.profile)


def check_ready(wish: Wish) -> None:
    """InputError when what every job here needs is missing: an account, the image or the training packages."""
    environment.require(wish.profile, wish.cache, at_a_glance=True)
    if wish.profile.container is None and wish.profile.python is None and importlib.util.find_spec("torch") is None:
        raise InputError(
            f"the training packages are not installed for {sys.executable}: run 'make env', or set "
            'SET="cluster.python=<an interpreter that has them>"'
        )


def space_needed(wish: Wish) -> int:
    """Merged weights, two checkpoints and a third being written (of what is trained, with two moments), and some."""
    shape = shapes.from_config(wish.model.config, wish.spec.model.name)
    merged = shape.params * (4 if wish.spec.export.dtype == "float32" else 2) if wish.spec.export.merged else 0
    return merged + 3 * memory.checkpoint_bytes(shape, wish.spec) + SPARE_BYTES


def require_space(need_bytes: int, purpose: str, *, new: Sequence[Wish]) -> None:
    """InputError where disk or group quota has no room for what the `new` runs write, with a way out if there is."""
    try:
        atomic.require_space(RUNS, need_bytes, purpose)
        if problem := quota.room_problem(new[0].profile, need_bytes, purpose):
            raise InputError(problem)
    except InputError as error:
        if not any(wish.spec.export.merged and wish.spec.method.adapts for wish in new):
            raise
        way = "SET=\"export.merged=false\" exports adapters alone, without a merged model each"
        raise InputError([f"{words}. {way}" for words in error.messages]) from None


def _dry_run(wish: Wish, name: str) -> int:
    print_plan(name, wish.spec, wish.plan, queued=wish.profile.scheduler is not None)
    if wish.profile.scheduler is None:
        print("Without Slurm these stages run here, one after the other; there are no scripts to show.")
        return 0
    from jobs import chain

    if wish.plan.zero:
        print(f"\n===== DeepSpeed's configuration =====\n{json.dumps(wish.plan.zero, indent=1)}")
    client.use(wish.profile.scheduler.slurm_conf)
    provenance = wishes.files_of(wish, name)["provenance.json"]
    show(chain.scripts(wish.profile, wish.plan, run=RUNS / name, provenance=provenance))
    return 0


def show(scripts: Iterable[tuple[str, str]]) -> None:
    """Print what a dry run would queue: (name, sbatch script)."""
    for name, script in scripts:
        print(f"\n===== {name} =====\n{script.rstrip()}")
    print("\nDry run: nothing was queued.")
