"""One run's stages on this machine, one after the other in the foreground, through submitit's local executor."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from submitit import Job
from submitit.local.local import LocalExecutor, LocalJob

from ftlib.errors import DONE, RUN_AGAIN, FtError
from ftlib.plan.plan import RunPlan
from ftlib.rundir import STAGES, RunDir
from ftlib.runs import act, outcome
from ftlib.runs.decide import Requeue, Stop
from ftlib.runs.events import Cancelled, Started, Submitted
from ftlib.runs.scheduler import Here
from ftlib.slurm import batch, client, container, requests
from ftlib.slurm.investigate import investigator
from jobs import logs, placement
from jobs import stage as stage_module

POLL_S = 0.1
# The exit code of what SIGKILL ended, as a shell reports it.
KILLED = 137
YEAR_MIN = 525_600


def run_stages(run: RunDir, stages: tuple[str, ...] = STAGES, planned: RunPlan | None = None) -> int:
    """Run what is missing; returns the exit code of the whole. Must be called under `run.claim()`.

    planned: a plan of the caller's own, with stages that no run has.
    """
    if planned is None:
        where = placement.of(run)
        profile, plan = where.profile, where.plan
    else:
        profile, plan = placement.owners_profile(run), planned
    cache = Path(run.provenance()["cache"])
    client.use(None)  # inside an interactive job its SLURM_* would make ranks of our one process
    # Ctrl-C, or SIGTERM: the first asks the stage to save, the second kills it.
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        for number, stage in enumerate(stages, 1):
            done = run.stage_done(stage)
            print(f"[{number}/{len(stages)}] {stage}{': done before' if done else ''}", flush=True)
            if not done:
                requests.write(run.path, profile, plan, [stage])
            variables = batch.environment(profile, plan, stage, run=run.path, cache=cache)
            python = container.worker(profile, plan, stage, run.provenance())
            if not done and (code := _stage(run, stage, python, variables, caught, stages == STAGES)) != DONE:
                return code
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
    return DONE


def _stage(
    run: RunDir, stage: str, python: str, variables: dict[str, str], caught: list[int], resumable: bool
) -> int:
    """Lives of one stage until one is done, wrong, or stopped by the person: the epilogue's work, in the foreground."""
    automatic = False
    while True:
        life = _next_life(run, stage)
        executor = LocalExecutor(run.slurm / stage, python=python)
        executor.update_parameters(timeout_min=YEAR_MIN, stderr_to_stdout=True)
        with _inherited(run.code, {**variables, "FT_LIFE": str(life)}):
            job = executor.submit(stage_module.run, str(run.path), stage)
        run.record(
            Submitted(stage=stage, job_id=str(job.job_id), after_attempt=life - 1, automatic=automatic)
        )
        _watch(run, stage, life, job, caught)
        if gone := run.gone():
            raise FtError(gone)
        automatic = True
        last = next((end for end in outcome.read(run.outcomes, stage) if end.attempt == life), None)
        if last and last.code == DONE:
            return DONE
        if caught:
            user = os.environ.get("USER")
            for missing in STAGES[STAGES.index(stage) :] if stage in STAGES else ():
                run.record(Cancelled(stage=missing, user=user))
            saved = last.message if last and last.code == RUN_AGAIN else "killed; the last committed checkpoint stands"
            again = f"make resume RUN={run.name} goes on from there" if resumable else "Start it anew"
            print(f"\n{stage}: {saved}. {again}.", flush=True)
            return RUN_AGAIN
        here = Here(job_id=str(job.job_id), stage=stage, attempt=life, ended=True)
        code = last.code if last else KILLED
        investigate = investigator(
            run.path, code=code, logs=Path(job.paths.stdout).parent, job_id=here.job_id, slurm=False
        )
        action = act.end_attempt(run, NoController(), here, investigate)
        if not isinstance(action, Requeue):
            message = f"{last.message}\n" if last else ""
            print(f"{message}{stage} stopped: {action.message}. make why RUN={run.name}", file=sys.stderr, flush=True)
            return action.code if isinstance(action, Stop) else RUN_AGAIN
        print(f"{stage}: {action.message}", flush=True)
        time.sleep(action.backoff_s)


class NoController:
    """`ftlib.runs.scheduler.Controller` of a run in the foreground, which has none."""

    def state(self, job_id: str) -> str | None:
        return None

    def restarts(self, job_id: str) -> int | None:
        return None

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        return False

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        return False


def _next_life(run: RunDir, stage: str) -> int:
    for left in (run.slurm / stage).glob("*.save_tmp"):
        left.unlink()  # A save that a kill cut short would make submitit's next one fail.
    life = 1
    while (file := run.lives / f"{stage}-{life}").exists():
        life += 1
    file.write_text(f"{os.getpid()} local {int(time.time())}\n", encoding="utf-8")
    return life


def _watch(run: RunDir, stage: str, life: int, job: Job[None], caught: list[int]) -> None:
    """Show a life's log as it grows, and pass Ctrl-C on, until it has ended."""
    assert isinstance(job, LocalJob) and job._process is not None
    shown, asked = 0, 0
    while True:
        ended = job._process.poll() is not None
        shown = logs.show(Path(job.paths.stdout), shown, last=ended)
        if ended:
            return
        if len(caught) > asked:
            asked = len(caught)
            print("\nstopping: saving first (Ctrl-C again to kill)" if asked == 1 else "\nkilling", flush=True)
            job._process.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)
            if asked > 1:
                _kill_tasks(run, stage, life)
        time.sleep(POLL_S)


@contextlib.contextmanager
def _inherited(folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """What a child started inside gets: working folder, environment, and Ctrl-C ignored (we pass it on as SIGTERM)."""
    here, environment = Path.cwd(), dict(os.environ)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(folder)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, handler)


def _kill_tasks(run: RunDir, stage: str, life: int) -> None:
    """SIGKILL the stage's own process: its controller is gone and cannot."""
    for started in run.ledger().of(Started, stage):
        if started.attempt == life:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(started.job_id), signal.SIGKILL)
