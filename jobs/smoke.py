"""`env` and `smoke`: what a run stands on, tried on a node in one short job before a long one is queued.

The job is a stage like any other, in a run folder of its own: `runs/smoke/<name>/`. `env` tries packages, driver, GPU
and storage; `smoke` goes on to the recipe's data and ten of its steps, and says what they tell of the whole run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib import atomic, metrics, rundir, state
from ftlib.errors import DONE, FtError, InputError, Interrupted
from ftlib.plan import numerics
from ftlib.plan.amount import TOKENS_PER_PAIR
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile
from ftlib.report.plan import minutes
from ftlib.rundir import RunDir
from ftlib.runs import chain as run_chain
from ftlib.runs import outcome
from ftlib.runs.events import CheckpointSaved, FirstStep
from ftlib.runs.scheduler import Request
from ftlib.slurm import client, queue
from ftlib.stop import StopFlag
from jobs import environment, fetch, local, logs, placement, stage, submit
from jobs import wish as wishes
from jobs.wish import Wish

if TYPE_CHECKING:
    from jobs.chain import SlurmSite

STAGE, PREPARE = "smoke", "prepare"
TRIAL = "trial.json"
STEPS, WARM = 10, 3
ENV_MIN, SMOKE_MIN = 5, 15
LEAST_EXAMPLES, MOST_EXAMPLES = 256, 20_000
# A shared file system may show a new file a minute late.
PREPARED_S = 120


def env(options: argparse.Namespace) -> int:
    """Check the environment on a GPU node; nothing to do where these locks were checked under this profile before."""
    wish = wishes.make(model="tiny", data=None, cluster=options.cluster, settings=options.set)
    environment.require(wish.profile, wish.cache)
    if options.before:
        return DONE
    told = wishes.files_of(wish, "")["provenance.json"]
    key = json.dumps([told["profile"], told["locks"], told["python"]])
    name = f"env-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    run = RunDir(wishes.RUNS / STAGE / name)
    if run.stage_done(STAGE) and not options.new:
        print(f"{outcome.read(run.outcomes, STAGE)[-1].message}. Checked before; NEW=1 checks again.")
        return DONE
    return _try(wish, name, limit_min=ENV_MIN, trial={"need_bytes": submit.SPARE_BYTES})


def smoke(options: argparse.Namespace) -> int:
    """Ten real steps of a recipe on a node, and what they tell of the whole run."""
    whole = wishes.asked(options)
    environment.require(whole.profile, whole.cache)
    fetch.require_access([whole])
    wish = wishes.asked(argparse.Namespace(**vars(options) | {"set": f"{options.set} {shortened(whole)}"}))
    trial = {"whole": whole.plan.model_dump(mode="json"), "need_bytes": submit.space_needed(whole)}
    return _try(wish, wish.name, limit_min=SMOKE_MIN, trial=trial)


def shortened(whole: Wish) -> str:
    """SET= for ten steps of a wish: the same model, method and batch on as little data as that takes."""
    spec = whole.spec
    tokens = STEPS * spec.train.global_batch * spec.data.seq_len
    examples = min(MOST_EXAMPLES, max(LEAST_EXAMPLES, math.ceil(2 * tokens / TOKENS_PER_PAIR[spec.data.template])))
    generated = not spec.data.path and not spec.data.hub
    words = ["data.share=null", f"train.steps={STEPS}", "train.log_every_steps=1", "tracking.mode=disabled"]
    words.append(f"data.limit={min(examples, spec.data.limit or examples)}")
    words += [f"data.pairs={min(examples, spec.data.pairs)}"] if generated else []
    words += [f"train.eval_every_steps={STEPS}"] if spec.train.eval_every_steps else []
    return " ".join(words)


def _try(wish: Wish, name: str, *, limit_min: int, trial: dict[str, Any]) -> int:
    """Queue the job, or run it here, and show it until it has ended. One that is queued already is waited for."""
    profile, runs = wish.profile, wishes.RUNS / STAGE
    run = RunDir(runs / name)
    if profile.scheduler:
        client.use(profile.scheduler.slurm_conf)
        jobs = {stage: job for stage, job in run.ledger().jobs.items() if stage in (PREPARE, STAGE)}
        job = jobs.get(STAGE)
        if job and state.SLURM_STATES.get(queue.ask([job]).jobs[job].state) in state.ACTIVE:
            print(f"Job {' and job '.join(jobs.values())}: on the way already.")
            return _follow(run, jobs, profile)
    if run.path.exists():
        with run.claim():  # refused while another process works in it
            atomic.discard_folder(run.path)
    files = wishes.files_of(wish, name)
    stages = files["plan.json"]["stages"]
    stages[STAGE] = stages["train"] | {"time_min": limit_min}
    of_stages = files[numerics.FILE]["stages"]
    of_stages[STAGE] = of_stages["train"]
    planned = RunPlan.model_validate(files["plan.json"])
    rundir.create(runs, name, {**files, TRIAL: trial}, wishes.SNAPSHOT)
    with run.claim():
        # What is downloaded and tokenized needs no GPU: a job of its own does it, in front.
        stages_here = (PREPARE, STAGE) if "whole" in trial else (STAGE,)
        if profile.scheduler is None:
            return local.run_stages(run, stages_here, planned)
        # A trial that fails is not tried again by itself.
        once = profile.model_copy(update={"scheduler": profile.scheduler.model_copy(update={"requeue": False})})
        before = _site(run, once, planned).queue_image()
        jobs = {}
        for stage_name in stages_here:
            # A long download may be preempted, and resumes where it stopped.
            site = _site(run, profile if stage_name == PREPARE else once, planned)
            request = Request((stage_name,), run_chain.new_nonce(), after_ok=before)
            before = run_chain.queue_job(run, site, run.ledger(), request, automatic=False)
            jobs[stage_name] = before
            where, minutes_most = stages[stage_name]["partition"], stages[stage_name]["time_min"]
            print(
                f"Queued: {stage_name} as job {before}, of {minutes_most} minutes at most, in {where}. "
                f"Log: {run.slurm / stage_name}"
            )
    return _follow(run, jobs, profile)


def _site(run: RunDir, profile: ClusterProfile, planned: RunPlan) -> SlurmSite:
    """The scheduler of a trial, whose stages no run has."""
    from jobs import chain

    where = placement.Placement.first(profile, planned)
    slurm_conf = profile.scheduler.slurm_conf if profile.scheduler else None
    return chain.SlurmSite(run, lambda: where, slurm_conf=slurm_conf)


def _follow(run: RunDir, jobs: dict[str, str], profile: ClusterProfile) -> int:
    """Show the logs of the jobs (stage -> id), one after the other, until all have ended; returns the exit code."""
    try:
        for stage_name, job in jobs.items():
            if code := _follow_stage(run, stage_name, job, profile):
                return code
    except KeyboardInterrupt:
        ids = " ".join(jobs.values())
        print(f"\nJob {ids} goes on without you: the same command waits for it again, scancel {ids} ends it.")
        raise
    return DONE


def _follow_stage(run: RunDir, stage_name: str, job: str, profile: ClusterProfile) -> int:
    """Show one job's log until it has ended; returns the exit code."""
    folder = run.slurm / stage_name
    log = folder / f"{job}_0_log.out"

    def ended() -> bool:
        """A prepare job that was interrupted is requeued by itself; Slurm then has the last word."""
        ends = outcome.read(run.outcomes, stage_name)
        return bool(ends) and (stage_name == STAGE or ends[-1].code == DONE)

    words = logs.follow(job, log, profile, ended)
    ends = outcome.read(run.outcomes, stage_name)
    if ends and ends[-1].code == DONE:
        return DONE
    # What stopped the job may be another rank's affair.
    for other in sorted(folder.glob(f"{job}_*_log.out")):
        if other != log and other.stat().st_size:
            print(other.name)
            logs.show(other, last=True)
    if ends:
        return ends[-1].code
    if not log.exists():
        words += (
            f", and it could not write its log. Do compute nodes see {folder}, and may they write there? Move the "
            "checkout to storage that they mount"
        )
    print(f"error: job {job} ended without a word: Slurm says {words}. Its folder: {run.path}", file=sys.stderr)
    return 1


# ---- what the job runs


def main(run: RunDir, life: int, stop: StopFlag) -> str:
    """The job's task, on every rank: checks, then the steps. InputError counts what failed; the log names it."""
    from ftlib.train import preflight

    trial = json.loads((run.path / TRIAL).read_text(encoding="utf-8"))
    plan, profile = run.plan(), placement.owners_profile(run)
    asked, rank = run.stage_plan(STAGE), int(os.environ.get("RANK", "0"))
    on_gpu, host, failed = asked["device"] == "cuda", os.uname().nodename, []

    def tell(check: preflight.Check) -> bool:
        if rank == 0 or not check.ok:
            print(check.line() if rank == 0 else f"{check.line()}\n{'':24}on {host}, rank {rank}", flush=True)
        failed.extend([] if check.ok else [check.name])
        return check.ok

    tell(preflight.packages())
    if on_gpu:
        for check in preflight.gpu(asked=asked["tasks_per_node"], planned_gib=plan["gpu_memory_gib"]):
            tell(check)
    else:
        tell(preflight.Check("GPU", True, "none is planned with here: the CPU computes"))
    if not failed:
        tell(preflight.imports())
    tell(preflight.storage(run.path, need_bytes=trial["need_bytes"]))
    tell(preflight.caches(profile.storage.home_gib))
    if failed:
        raise InputError(f"{len(failed)} of the checks on {host} failed: {', '.join(failed)}; the mends stand above")
    if "whole" not in trial:
        return f"the environment of {profile.name} works on {host}"
    steps = _steps(run, life, stop, tell)
    if not steps.ok:
        raise InputError(f"{steps.name} failed on {host}: {steps.words}")
    if rank == 0:
        _measured(run, trial["whole"], preflight.peak_gib(asked["device"]))
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return f"{STEPS} steps of {run.spec().recipe} work on {host}"


def _steps(run: RunDir, life: int, stop: StopFlag, tell: Any) -> Any:
    """Data, collectives and the steps themselves; the last check, good or not."""
    from ftlib.train.preflight import Check, collectives

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    name = "data"
    try:
        _await(run.prepared_file)
        if rank == 0:
            rows = run.prepared()["train"]
            tell(Check(name, True, f"{rows['examples']:,} examples in {rows['rows']:,} rows"))
        on_gpu = run.numerics().stages[STAGE].device == "cuda"
        met = collectives(on_gpu=on_gpu, name=f"{run.path} {STAGE} {life}") if world > 1 else None
        if met and not tell(met):
            return met
        name = f"{STEPS} steps"
        check = Check(name, True, stage.train(run, life, stop))
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, it is what the trial was for
        if not isinstance(error, FtError):
            traceback.print_exc()
        mend = "the words above say where"
        if "out of memory" in str(error).lower():
            mend = "a smaller train.micro_batch or data.seq_len, or train.gradient_checkpointing=true (make plan)"
        line = (str(error).splitlines() or [""])[0]
        check = Check(name, False, f"{type(error).__name__}: {line}", mend)
    tell(check)
    return check


def _await(file: Path) -> None:
    """The first rank writes it; a node that does not see it has another storage under the same name."""
    deadline = time.monotonic() + PREPARED_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise InputError(f"{os.uname().nodename} does not see {file}: is that folder shared by all nodes?")
        time.sleep(0.5)


def _measured(run: RunDir, whole: dict[str, Any], peak: float) -> None:
    """Print what the steps tell of the whole run, beside its plan; smoke.json holds the same."""
    rows = [row for row in metrics.read_metrics(run.metrics_file) if "loss" in row][WARM:]
    speed, step_s = (statistics.median(row[name] for row in rows) for name in ("tokens_per_s", "seconds"))
    known = run.ledger()
    save_s = known.of(CheckpointSaved)[-1].seconds
    start_s = sum(sum(first_step.parts_s.values()) for first_step in known.of(FirstStep))
    asked = whole["stages"]["train"]
    on_gpu = asked["device"] == "cuda"
    planned_gib = whole["gpu_needed_gib"] if on_gpu else asked["mem_gib"]
    # Unknown where the data's size is; then only what was measured is printed.
    train_min = None if whole["steps"] is None else whole["steps"] * step_s / 60
    found = {
        "tokens_per_s": speed, "planned_tokens_per_s": whole["tokens_per_s"], "peak_gib": round(peak, 2),
        "planned_gib": planned_gib, "step_s": step_s, "save_s": save_s, "start_s": round(start_s, 1),
        "whole_min": None if train_min is None else round(train_min, 1), "planned_min": asked["estimate_min"],
        "gpu_hours": round(train_min / 60 * whole["world_size"], 2) if on_gpu and train_min is not None else None,
    }  # fmt: skip
    atomic.write_json(run.path / "smoke.json", found)
    there = f" of {whole['gpu_memory_gib']:g}" if on_gpu else " of host memory"
    plan = f"{whole['tokens_per_s']:,.0f}" if whole["tokens_per_s"] else "unknown"
    print(
        f"speed   {speed:,.0f} tokens/s (plan: {plan})\n"
        f"memory  {peak:.1f} GiB at most (plan: {planned_gib:.1f} GiB{there})\n"
        f"start   {start_s:.0f} s to the first step; a save takes {save_s:.1f} s",
        flush=True,
    )
    if train_min is None:
        print(f"A step takes {step_s:.2f} s; how many there are is unknown until the data is prepared.", flush=True)
        return
    cost = f", {found['gpu_hours']:.1f} GPU-hours" if on_gpu else ""
    lives, limit = math.ceil(train_min / asked["time_min"]), minutes(asked["time_min"])
    print(
        f"The whole training of {whole['steps']:,} steps would take {minutes(train_min)} at this speed{cost} (plan: "
        f"{minutes(asked['estimate_min'])}){f'; its limit of {limit} makes {lives} lives of it' if lives > 1 else ''}.",
        flush=True,
    )
