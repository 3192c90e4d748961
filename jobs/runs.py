"""Commands about runs that exist: status, logs, cancel, resume; and starting one, which resume and submit share."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections import defaultdict

from ftlib import rundir, state
from ftlib.errors import DONE, InputError, unknown
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import client
from ftlib.state import StageState
from jobs.wish import RUNS, stored_profile

ACTIVE = ("queued", "running")


def start(run: RunDir, profile: ClusterProfile) -> int:
    """Queue what is missing, or run it here; says where to look next."""
    with run.claim():
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
    found = look([run])[run.name]
    now = state.overall(found)
    if now == "completed":
        print(f"{run.name} is completed.")
        _say_results(run)
        return DONE
    if any(s.state in ACTIVE for s in found.values()) and now in ACTIVE:
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


def look(runs: list[RunDir]) -> dict[str, dict[str, StageState]]:
    """Every run's stages, with one question to each cluster's scheduler."""
    by_conf: dict[str | None, list[RunDir]] = defaultdict(list)
    found: dict[str, dict[str, StageState]] = {}
    for run in runs:
        profile = stored_profile(run)
        if profile.scheduler is None:
            found[run.name] = state.stages(run, None, alive=_writer_lives(run))
        else:
            by_conf[profile.scheduler.slurm_conf].append(run)
    for conf, members in by_conf.items():
        from jobs import chain

        wanted = [
            job for run in members for stage, job in state.submissions(run).items() if not run.stage_done(stage)
        ]
        client.use(conf)
        view = chain.scheduler_view(wanted) if wanted else {}
        found.update({run.name: state.stages(run, view) for run in members})
    return {run.name: found[run.name] for run in runs}


def status(options: argparse.Namespace) -> int:
    """Print every run's stages, or those of one run."""
    chosen = [rundir.find(RUNS, options.run)] if options.run else rundir.every(RUNS)
    found = look(chosen)
    if options.json:
        print(json.dumps([state.as_json(run, found[run.name]) for run in chosen], indent=1))
        return DONE
    if not chosen:
        print("No runs yet. `make submit` makes one.")
        return DONE
    from ftlib.report.status import print_status

    print_status(chosen, found)
    return DONE


def logs(options: argparse.Namespace) -> int:
    """Print the newest log of a stage; with --follow until interrupted or the run has ended."""
    run = rundir.find(RUNS, options.run)
    if options.stage and options.stage not in STAGES:
        raise InputError(unknown("STAGE", options.stage, STAGES))
    wanted = [options.stage] if options.stage else list(STAGES)
    files = [path for stage in wanted for path in (run.slurm / stage).glob("*_log.out")]
    if not files:
        print(f"{run.name}: no log of {options.stage or 'any stage'} yet.")
        return DONE
    newest = max(files, key=lambda path: path.stat().st_mtime)
    print(f"==> {newest}", file=sys.stderr)
    with newest.open(encoding="utf-8", errors="replace") as file:
        while True:
            text = file.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if not options.follow or run.stage_done(newest.parent.name):
                return DONE
            if not text:
                time.sleep(0.5)


def why(options: argparse.Namespace) -> int:
    """Print what happened in each life of a run, and what to do now."""
    from ftlib.report import plan, why

    run = rundir.find(RUNS, options.run)
    why.print_why(run, look([run])[run.name], plan.console())
    return DONE


def verify(options: argparse.Namespace) -> int:
    """Check every checkpoint of a run; 1 when one is damaged."""
    from ftlib.report import plan, why

    return DONE if why.print_verify(rundir.find(RUNS, options.run), plan.console()) else 1


def cancel(options: argparse.Namespace) -> int:
    """End a run's jobs."""
    run = rundir.find(RUNS, options.run)
    profile = stored_profile(run)
    found = look([run])[run.name]
    if profile.scheduler is None:
        writer = _writer(run)
        if writer is None or not _writer_lives(run):
            print(f"{run.name}: nothing is running.")
            return DONE
        os.kill(writer, signal.SIGTERM)
        print(f"{run.name}: asked to save and stop.")
        return DONE
    from jobs import chain

    active = {name: s.job_id for name, s in found.items() if s.state in ACTIVE and s.job_id}
    if not active:
        print(f"{run.name}: nothing is queued or running.")
        return DONE
    chain.cancel(run, active)
    print(f"{run.name}: cancelled {', '.join(active)}. make resume RUN={run.name} would go on.")
    return DONE


def resume(options: argparse.Namespace) -> int:
    """Queue what is missing of a run, under the profile it was submitted with."""
    run = rundir.find(RUNS, options.run)
    return go_on(run, stored_profile(run), asked=True)


def _writer(run: RunDir) -> int | None:
    """Process id of the foreground process that works on the run on this machine."""
    try:
        host, _, pid = (run.path / "writer").read_text(encoding="utf-8").strip().partition(" ")
    except FileNotFoundError:
        return None
    return int(pid) if host == socket.gethostname() and pid.isdigit() else None


def _writer_lives(run: RunDir) -> bool:
    writer = _writer(run)
    return writer is not None and rundir.alive(writer)


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
