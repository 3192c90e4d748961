"""Commands that act on runs that exist: cancel and resume (with other nodes, too); starting one, as submit does."""

from __future__ import annotations

import argparse
import getpass
import os
import signal

from ftlib import recipe, rundir, state
from ftlib.errors import DONE, FtError, InputError, Unavailable
from ftlib.profile import ClusterProfile
from ftlib.report.status import Seen
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import act
from ftlib.runs.decide import Action, Nothing, QueueAnew
from ftlib.runs.events import Moved
from ftlib.runs.ledger import Ledger
from ftlib.slurm.investigate import investigator
from ftlib.state import ACTIVE
from jobs import changes, placement
from jobs import wish as wishes
from jobs.look import kept_answer, see_one, writer
from jobs.wish import RUNS


def start(run: RunDir, profile: ClusterProfile) -> int:
    """Queue what is missing, or run it here; says where to look next."""
    if profile.scheduler is None:
        return _run_here(run)
    return _queue(run, even_cancelled=True)


def _run_here(run: RunDir) -> int:
    from jobs import local

    with run.claim():
        _settle_in(run)
        code = local.run_stages(run)
    if code == DONE:
        _say_results(run)
    return code


def _queue(run: RunDir, *, even_cancelled: bool) -> int:
    """Do what the owner's request asks for, and say what was done."""
    from jobs import chain

    _settle_in(run)
    site = chain.site_of(run)
    before, adopted = run.ledger(), list[str]()
    action = act.resume(
        run, site, site.jobs, investigator(run.path), user=getpass.getuser(),
        even_cancelled=even_cancelled, image_job=site.queue_image, on_adopted=adopted.extend,
    )  # fmt: skip
    after = run.ledger()
    for stage in adopted:
        print(f"Found the job of {stage} that an interrupted submit had queued; it belongs to this run.")
    new = {stage: job for stage, job in after.jobs.items() if before.jobs.get(stage) != job}
    queued = {stage: job for stage, job in new.items() if stage in STAGES and stage not in adopted}
    if not isinstance(action, QueueAnew) and not queued:
        return _nothing_queued(run, action)
    if before.jobs.get(action.stage) and queued:
        print(f"Continuing at {action.stage}{_why(after, action)}.")
    stages_of: dict[str, list[str]] = {}
    for stage, job in queued.items():
        stages_of.setdefault(job, []).append(stage)
    if stages_of:
        print("Queued: " + ", ".join(f"{' and '.join(stages)} {job}" for job, stages in stages_of.items()))
    print(f"Watch it: make status RUN={run.name}   make logs RUN={run.name} FOLLOW=1")
    return DONE


def _why(ledger: Ledger, action: Action) -> str:
    """How the stage at which the run continues ended last, in brackets; empty where nothing tells."""
    ends = ledger.outcomes.get(action.stage, ())
    return f" ({ends[-1].message})" if ends else ""


def _nothing_queued(run: RunDir, action: Action) -> int:
    """Say why there was nothing to queue."""
    if run.ledger().first_open is None:
        print(f"{run.name} is completed.")
        _say_results(run)
    elif action.cause == "cancelled" and isinstance(action, Nothing) and action.over:
        print(f"It was cancelled and will not be restarted. make resume RUN={run.name} resumes it.")
    elif action.cause == "cancelled":
        raise FtError(f"{run.name}: {action.message}. Try again in a moment")
    else:
        seen = see_one(run)
        doing = ", ".join(f"{name} {stage.state}" for name, stage in seen.stages.items())
        print(f"{run.name} is on its way: {doing}.")
    return DONE


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
    """What resume (`asked`), or a second submit of the same settings, does about a run that exists."""
    seen = _see_surely(run)
    if seen.place == "moved" and any(stage.state in ACTIVE for stage in seen.stages.values()):
        raise InputError(f"run {run.name}: {seen.notes[0]}. make cancel RUN={run.name}, then make resume again")
    if profile.scheduler is not None:
        return _queue(run, even_cancelled=asked)
    if state.overall(seen.stages) == "completed":
        print(f"{run.name} is completed.")
        _say_results(run)
        return DONE
    if state.overall(seen.stages) in ACTIVE:
        doing = ", ".join(f"{name} {stage.state}" for name, stage in seen.stages.items())
        print(f"{run.name} is on its way: {doing}.")
        return DONE
    return _run_here(run)


def submit_again(run: RunDir, profile: ClusterProfile, settings: str) -> int:
    """What a second submit of the same settings does: the profile that holds now is for all that it queues.

    settings: SET=, in which a person may name fields of the profile.
    """
    changes.follow(run, profile, settings, wishes.locks())
    return go_on(run, placement.owners_profile(run), asked=False)


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
    profile = placement.owners_profile(run)
    if profile.scheduler is None:
        process = writer(run)
        if process:
            os.kill(process, signal.SIGTERM)
        print(f"{run.name}: {'asked to save and stop' if process else 'nothing is running'}.")
        return DONE
    from jobs import chain

    stages = act.cancel(run, chain.site_of(run), user=getpass.getuser())
    if not stages:
        print(f"{run.name}: nothing is queued or running.")
        return DONE
    kept_answer(profile.scheduler.slurm_conf).unlink(missing_ok=True)
    print(f"{run.name}: cancelled {', '.join(stages)}. make resume RUN={run.name} resumes it.")
    return DONE


def resume(options: argparse.Namespace) -> int:
    """Queue what is missing of a run, under the profile it was submitted with; SET=cluster.… changes that for good."""
    run = rundir.find(RUNS, options.run)
    wish, cluster = recipe.parse_set(options.set)
    if wish:
        raise InputError([f"SET: {field}: a run's recipe is fixed; resume changes cluster.… alone" for field in wish])
    busy = _active(run) if options.nodes else []
    wanted = changes.of_resume(run, cluster, options.nodes, busy=busy, locks=wishes.locks())
    if wanted:
        with run.claim():
            changes.record(run, wanted)
        if options.nodes:
            print(changes.sentence(run))
    return go_on(run, placement.owners_profile(run), asked=True)


def _active(run: RunDir) -> list[str]:
    """The stages that are queued or running."""
    return [name for name, stage in _see_surely(run).stages.items() if stage.state in ACTIVE]


def _say_results(run: RunDir) -> None:
    print(f"Results: {run.path}")
    results = {"report": run.report_file, "scores": run.evaluation_file, "adapter": run.export / "adapter"}
    for words, path in {**results, "merged weights": run.export / "merged"}.items():
        if path.exists():
            print(f"  {words:15} {path.relative_to(run.path)}")
