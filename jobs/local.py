"""One run's stages on this machine, one after the other in the foreground, through submitit's local executor."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from submitit.local.local import LocalExecutor, LocalJob

from ftlib import events, outcome
from ftlib.errors import DONE, RUN_AGAIN
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.rundir import STAGES, RunDir
from ftlib.slurm import batch, client, container, settle
from jobs import follow
from jobs import stage as stage_module

POLL_S = 0.1
YEAR_MIN = 525_600


class Interrupt:
    """Ctrl-C or SIGTERM of the foreground process: the first asks the stage to save, the second kills it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


def run_stages(run: RunDir, profile: ClusterProfile, stages: tuple[str, ...] = STAGES) -> int:
    """Run what is missing; returns the exit code of the whole. Must be called under `run.claim()`."""
    plan, cache = RunPlan.model_validate(run.plan()), Path(run.provenance()["cache"])
    client.use(None)  # inside an interactive job its SLURM_* would make ranks of our one process
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, stage in enumerate(stages, 1):
            if run.stage_done(stage):
                print(f"[{number}/{len(stages)}] {stage}: done before", flush=True)
                continue
            print(f"[{number}/{len(stages)}] {stage}", flush=True)
            variables = batch.environment(profile, plan, stage, run=run.path, cache=cache)
            code = _stage(run, profile, stage, variables, interrupt)
            if code != DONE:
                return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return DONE


def _stage(run: RunDir, profile: ClusterProfile, stage: str, variables: dict[str, str], interrupt: Interrupt) -> int:
    """Lives of one stage until one is done, wrong, or stopped by the person: the epilogue's work, in the foreground."""
    automatic = False
    while True:
        life = _next_life(run, stage)
        job = _life(run, profile, stage, {**variables, "FT_LIFE": str(life)}, interrupt, automatic=automatic)
        automatic = True
        last = next((end for end in outcome.read(run.outcomes, stage) if end.life == life), None)
        if last and last.code == DONE:
            return DONE
        if interrupt.count:
            _cancelled(run, stage)
            saved = last.words if last and last.code == RUN_AGAIN else "killed; the last committed checkpoint stands"
            print(f"\n{stage}: {saved}. make resume RUN={run.name} goes on from there.", flush=True)
            return RUN_AGAIN
        code = last.code if last else settle.KILLED
        verdict = settle.end(run.path, stage, life, code, job.job_id, Path(job.paths.stdout))
        if verdict.do != "requeue":
            said = f"{last.words}\n" if last else ""
            print(f"{said}{stage} stopped: {verdict.words}. make why RUN={run.name}", file=sys.stderr, flush=True)
            return verdict.code
        print(f"{stage}: {verdict.words}", flush=True)
        time.sleep(verdict.backoff_s)


def _next_life(run: RunDir, stage: str) -> int:
    for left in (run.slurm / stage).glob("*.save_tmp"):
        left.unlink()  # A save that a kill cut short would make submitit's next one fail.
    life = 1
    while (file := run.lives / f"{stage}-{life}").exists():
        life += 1
    file.write_text(f"{os.getpid()} local {int(time.time())}\n", encoding="utf-8")
    return life


def _life(
    run: RunDir, profile: ClusterProfile, stage: str, variables: dict[str, str], interrupt: Interrupt, *,
    automatic: bool,
) -> LocalJob[None]:  # fmt: skip
    """Start one life, show its log as it grows, pass Ctrl-C on as a request to save, return when it has ended."""
    plan, life = RunPlan.model_validate(run.plan()), int(variables["FT_LIFE"])
    executor = LocalExecutor(run.slurm / stage, python=container.worker(profile, plan, stage, run.provenance()))
    executor.update_parameters(timeout_min=YEAR_MIN, stderr_to_stdout=True)
    with _inherited(run.code, variables):
        job = executor.submit(stage_module.run, str(run.path), stage)
    assert isinstance(job, LocalJob) and job._process is not None
    said = {"stage": stage, "job_id": job.job_id, "after_life": life - 1, "automatic": automatic}
    events.append(run.events, events.submit_writer(), "submitted", **said)
    log = Path(job.paths.stdout)
    shown, asked = 0, 0
    while True:
        ended = job._process.poll() is not None
        shown = follow.show(log, shown, last=ended)
        if ended:
            return job
        if interrupt.count > asked:
            asked = interrupt.count
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
    for event in events.read(run.events):
        if event["event"] == "started" and event.get("stage") == stage and event.get("life") == life:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(event["job_id"]), signal.SIGKILL)


def _cancelled(run: RunDir, stage: str) -> None:
    for missing in STAGES[STAGES.index(stage) :]:
        events.append(run.events, events.submit_writer(), "cancelled", stage=missing, user=os.environ.get("USER"))
