"""Commands that act on runs that exist: cancel and resume (with other nodes, too); starting one, as submit does."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import signal
from pathlib import Path

from ftlib import atomic, modelfiles, recipe, rundir, state
from ftlib.errors import DONE, FtError, InputError, Unavailable
from ftlib.plan import plan, shapes
from ftlib.profile import ClusterProfile
from ftlib.report.status import Seen
from ftlib.rundir import RunDir
from ftlib.runs import earlier
from ftlib.runs.events import Cancelled, Moved, Override
from ftlib.runs.overrides import MICRO_BATCH
from ftlib.slurm import client
from ftlib.spec import divisors, validate
from ftlib.state import ACTIVE
from jobs.look import kept_answer, see_one, writer
from jobs.wish import CHECKOUT, RUNS, stored_profile


def start(run: RunDir, profile: ClusterProfile) -> int:
    """Queue what is missing, or run it here; says where to look next."""
    with run.claim():
        _settle_in(run)
        if profile.scheduler is None:
            from jobs import local

            code = local.run_stages(run, profile)
            if code == DONE:
                _say_results(run)
            return code
        from jobs import chain

        client.use(profile.scheduler.slurm_conf)
        for stage in chain.adopt(run):
            print(f"Found the job of {stage} that an interrupted submit had queued; it belongs to this run.")
        queued = chain.queue(run, profile, _active(run))
    if queued:
        stages_of: dict[str, list[str]] = {}
        for stage, job in queued.items():
            stages_of.setdefault(job, []).append(stage)
        print("Queued: " + ", ".join(f"{' and '.join(stages)} {job}" for job, stages in stages_of.items()))
    print(f"Watch it: make status RUN={run.name}   make logs RUN={run.name} FOLLOW=1")
    return DONE


def _active(run: RunDir) -> dict[str, str]:
    """The stages that are queued or running, and their jobs."""
    return {name: s.job_id for name, s in see_one(run).stages.items() if s.state in ACTIVE and s.job_id}


def _see_surely(run: RunDir) -> Seen:
    """The run, now.

    Unavailable where the state of a stage cannot be learned: acting on a guess would be worse than waiting.
    """
    seen = see_one(run)
    jobs = {stage.job_id for stage in seen.stages.values() if stage.job_id and stage.state != "completed"}
    if unknown := seen.answer.unknown(sorted(jobs)):
        which = f"how job {', '.join(unknown)} ended cannot be learned"
        raise Unavailable(f"{which}: {seen.answer.trouble}. Try again later")
    return seen


def go_on(run: RunDir, profile: ClusterProfile, *, asked: bool) -> int:
    """What resume, or a second submit of the same wish, does about a run that exists."""
    seen = _see_surely(run)
    found = seen.stages
    now = state.overall(found)
    ended = {event.job_id for event in run.ledger().of(Cancelled)}
    if ending := [name for name, s in found.items() if s.state in ACTIVE and s.job_id in ended]:
        raise FtError(f"{run.name}: {', '.join(ending)} was cancelled and is still saving. Try again in a moment")
    if now == "completed":
        print(f"{run.name} is completed.")
        _say_results(run)
        return DONE
    if any(s.state in ACTIVE for s in found.values()) and now in ACTIVE:
        if seen.place == "moved":
            raise InputError(f"run {run.name}: {seen.notes[0]}. make cancel RUN={run.name}, then make resume again")
        doing = ", ".join(f"{name} {s.state}" for name, s in found.items())
        print(f"{run.name} is on its way: {doing}.")
        if profile.scheduler and any(s.job_id is None and s.state != "completed" for s in found.values()):
            return start(run, profile)
        return DONE
    # A stage without a job was not cancelled: the submit that would have queued it was killed.
    by_owner = any(s.state == "cancelled" and s.job_id for s in found.values())
    if now == "cancelled" and by_owner and not asked and profile.scheduler is not None:
        print(f"It was cancelled and stays so. make resume RUN={run.name} goes on where it stopped.")
        return DONE
    where = next(name for name, s in found.items() if s.state != "completed")
    why = f" ({found[where].words})" if found[where].words else ""
    print(f"Going on at {where}{why}.")
    return start(run, profile)


def _settle_in(run: RunDir) -> None:
    """A run that was moved or copied goes on where it lies now. Its checkpoints know it by its name."""
    provenance = run.provenance()
    place, words = state.elsewhere(run, run.ledger(), provenance)
    if place == "here":
        return
    if provenance["run"] != run.name:
        mend = "Give the folder its name back, or make submit … NEW=1 for another run"
        raise InputError(f"run {run.name}: {words}. {mend}")
    run.record(Moved(to=str(run.path)))


def cancel(options: argparse.Namespace) -> int:
    """End a run's jobs."""
    run = rundir.find(RUNS, options.run)
    profile = stored_profile(run)
    if profile.scheduler is None:
        process = writer(run)
        if process:
            os.kill(process, signal.SIGTERM)
        print(f"{run.name}: {'asked to save and stop' if process else 'nothing is running'}.")
        return DONE
    from jobs import chain

    if not (active := _active(run)):
        print(f"{run.name}: nothing is queued or running.")
        return DONE
    chain.cancel(run, active)
    kept_answer(profile.scheduler.slurm_conf).unlink(missing_ok=True)
    print(f"{run.name}: cancelled {', '.join(active)}. make resume RUN={run.name} would go on.")
    return DONE


def resume(options: argparse.Namespace) -> int:
    """Queue what is missing of a run, under the profile it was submitted with; SET=cluster.… changes that for good."""
    run = rundir.find(RUNS, options.run)
    wish, changes = recipe.parse_set(options.set)
    if wish:
        raise InputError([f"SET: {field}: a run's recipe is fixed; resume changes cluster.… alone" for field in wish])
    profile = stored_profile(run)
    if changes:
        values = recipe.override(profile.model_dump(mode="json"), changes)
        profile = validate(ClusterProfile, values, f"cluster {profile.name}")
        atomic.write_json(run.provenance_file, {**run.provenance(), "profile": profile.model_dump(mode="json")})
    if options.nodes:
        stages = _see_surely(run).stages
        resize(run, profile, options.nodes, [name for name, stage in stages.items() if stage.state in ACTIVE])
    return go_on(run, profile, asked=True)


def resize(run: RunDir, profile: ClusterProfile, nodes: str, busy: list[str]) -> None:
    """Plan the run's training for another number of nodes: the same wish, the global batch unchanged.

    InputError where that cannot be; `busy`: stages with a job, which has its size already.
    """
    if not nodes.isdigit() or nodes == "0":
        raise InputError(f"NODES: {nodes!r} is no number of nodes; allowed: 1 and more")
    if run.stage_done("train"):
        raise InputError(f"NODES: the training of {run.name} is done; there is nothing to go on with")
    if busy:
        raise InputError(
            f"NODES: {', '.join(busy)} of {run.name} is queued or running with the nodes it has. "
            f"make cancel RUN={run.name}, and once that has ended make resume RUN={run.name} NODES={nodes}"
        )
    spec, provenance, before = run.spec(), run.provenance(), run.plan()
    files = modelfiles.locate(
        provenance["model_path"], spec.model.revision, checkout=CHECKOUT, cache=Path(provenance["cache"]), internet=True
    )
    share = spec.train.global_batch // (int(nodes) * spec.resources.gpus_per_node)
    # What fitted until now, as earlier lives may have taught it.
    fitting = [rows for rows in divisors(max(1, share)) if rows <= before["micro_batch"]]
    resources = spec.resources.model_copy(update={"nodes": int(nodes)})
    train = spec.train.model_copy(update={"micro_batch": fitting[-1]})
    wish = spec.model_copy(update={"resources": resources, "train": train})
    data = provenance["data_path"]
    size = Path(data).stat().st_size if data and Path(data).exists() else None
    made = plan.make(wish, profile, shapes.from_config(files.config, spec.model.name), data_bytes=size)
    with run.claim():
        # The new plan's micro-batch is one that fits.
        why = f"the training goes on with {nodes} node{'s' if nodes != '1' else ''}"
        run.record(Override(field=MICRO_BATCH, value=None, who=getpass.getuser(), why=why))
        earlier.forget_micro_batch(run.path)
        atomic.write_json(run.plan_file, json.loads(made.model_dump_json()))
    print(
        f"{run.name} goes on with {nodes} node{'s' if nodes != '1' else ''}: micro-batch {made.micro_batch} x "
        f"accumulation {made.accumulation} x {made.world_size} GPUs, {spec.train.global_batch} rows a step as before"
    )


def _say_results(run: RunDir) -> None:
    print(f"Results: {run.path}")
    results = {"report": run.report_file, "scores": run.evaluation_file, "adapter": run.export / "adapter"}
    for words, path in {**results, "merged weights": run.export / "merged"}.items():
        if path.exists():
            print(f"  {words:15} {path.relative_to(run.path)}")
