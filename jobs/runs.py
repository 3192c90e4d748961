"""Commands that act on runs that exist: cancel and resume; and starting one, which resume and submit share."""

from __future__ import annotations

import argparse
import os
import signal

from ftlib import atomic, events, recipe, rundir, state
from ftlib.errors import DONE, FtError, InputError
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.slurm import client
from ftlib.spec import validate
from ftlib.state import ACTIVE
from jobs.look import kept_answer, look, see, writer
from jobs.wish import RUNS, stored_profile


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
        active = {name: s.job_id for name, s in look([run])[run.name].items() if s.state in ACTIVE and s.job_id}
        queued = chain.queue(run, profile, active)
    if queued:
        print("Queued: " + ", ".join(f"{stage} {job}" for stage, job in queued.items()))
    print(f"Watch it: make status RUN={run.name}   make logs RUN={run.name} FOLLOW=1")
    return DONE


def go_on(run: RunDir, profile: ClusterProfile, *, asked: bool) -> int:
    """What resume, or a second submit of the same wish, does about a run that exists."""
    (seen,) = see([run])
    found = seen.stages
    now = state.overall(found)
    ended = {str(event.get("job_id")) for event in events.read(run.events) if event["event"] == "cancelled"}
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
    place, words = state.elsewhere(run, state.journal(run), provenance)
    if place == "here":
        return
    if provenance["run"] != run.name:
        raise InputError(
            f"run {run.name}: {words}. Give the folder its name back, or make submit … NEW=1 for another run"
        )
    events.append(run.events, events.submit_writer(), "moved", to=str(run.path))


def cancel(options: argparse.Namespace) -> int:
    """End a run's jobs."""
    run = rundir.find(RUNS, options.run)
    profile = stored_profile(run)
    found = look([run])[run.name]
    if profile.scheduler is None:
        process = writer(run)
        if process is None:
            print(f"{run.name}: nothing is running.")
            return DONE
        os.kill(process, signal.SIGTERM)
        print(f"{run.name}: asked to save and stop.")
        return DONE
    from jobs import chain

    active = {name: s.job_id for name, s in found.items() if s.state in ACTIVE and s.job_id}
    if not active:
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
        from jobs import resize

        busy = [name for name, s in look([run])[run.name].items() if s.state in ACTIVE and s.job_id]
        resize.resize(run, profile, options.nodes, busy)
    return go_on(run, profile, asked=True)


def _say_results(run: RunDir) -> None:
    print(f"Results: {run.path}")
    for words, path in (
        ("report", run.report_file),
        ("scores", run.evaluation_file),
        ("adapter", run.export / "adapter"),
        ("merged weights", run.export / "merged"),
    ):
        if path.exists():
            print(f"  {words:15} {path.relative_to(run.path)}")
