"""What a Slurm task or a local process runs: one life of one stage: signals first, then the work, then the outcome."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType

from ftlib import allocation
from ftlib.errors import DONE, INPUT_WRONG, FtError, Interrupted
from ftlib.rundir import RunDir
from ftlib.runs import events, outcome
from ftlib.runs.events import Ended, Started
from ftlib.runs.outcome import Outcome
from ftlib.stop import StopFlag

# On a CPU bitsandbytes looks for a faster kernel on a hub when it is imported, and warns; its own serve.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Nobody acts on it: the epilogue of a superseded life does nothing.
SUPERSEDED = 70
# The looks, one after the other, that must miss the run folder: a shared file system may err for a moment.
GONE_LOOKS = 3


def run(folder: str, stage: str) -> None:
    """Run `stage` of the run at `folder`; ends the process with the outcome's exit code."""
    stop = StopFlag().install()
    _close_stdin()
    # A terminal's Ctrl-C reaches every process of the group; the foreground one decides and sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rundir = RunDir(Path(folder))
    # The code that runs is the code that was submitted, not whatever lies in front of it on the path.
    here, snapshot = Path(__file__).resolve(), rundir.code.resolve()
    if snapshot not in here.parents:
        raise RuntimeError(f"the stage would run {here}, not the snapshot in {snapshot}")
    life = int(os.environ["FT_LIFE"])
    rank = _set_rank()
    if rank == 0:
        threading.Thread(target=leave_when_superseded, args=(rundir, stage, life), daemon=True).start()
    try:
        code = _live(rundir, stage, life, rank, stop)
    except OSError:
        if not (gone := rundir.gone()):
            raise
        print(f"{stage} stopped: {gone}", flush=True)
        code = INPUT_WRONG
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the outcome is committed, and an abandoned load or a library's thread must not change the end.
    os._exit(code)


def _close_stdin() -> None:
    """Read nothing from whatever the submitting shell had as standard input: a library that asks a question there (such
    as whether to run a model's own code) gets no answer."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing != 0:  # it is 0 where standard input was closed
        os.dup2(nothing, 0)
        os.close(nothing)


def leave_when_superseded(rundir: RunDir, stage: str, life: int, *, every_s: float = 5) -> None:
    """End this process as soon as a later life of its stage has begun, without a word, or its run folder is gone.

    A node that Slurm gave up, or a task whose slurmstepd was killed, may still be at work: one writer is enough.
    """
    later = rundir.lives / f"{stage}-{life + 1}"
    missed = 0
    while not later.exists():
        gone = rundir.gone()
        missed = missed + 1 if gone else 0
        if missed == GONE_LOOKS:
            print(f"{stage} stopped: {gone}", flush=True)
            os._exit(INPUT_WRONG)
        time.sleep(every_s)
    os._exit(SUPERSEDED)


def _live(rundir: RunDir, stage: str, life: int, rank: int, stop: StopFlag) -> int:
    writer = f"{stage}-{life}"
    if rank == 0:
        # Of an array's task, SLURM_JOB_ID is not what squeue and sacct call it.
        job = os.environ.get("FT_JOB") or os.environ.get("SLURM_JOB_ID") or str(os.getpid())
        # A job that stages share may hold more GPUs than this one plans for.
        gpus = allocation.gpus_given(os.environ) if "SLURM_JOB_ID" in os.environ else None
        started = Started(
            stage=stage, attempt=life, job_id=job, node=socket.gethostname(), image=os.environ.get("FT_IMAGE"),
            gpus=gpus,
        )  # fmt: skip
        rundir.record(started, writer=writer)
    began = time.monotonic()
    try:
        # Before torch is imported, which reads the variable when it first looks for GPUs.
        allocation.check(stage, rundir.stage_plan(stage), os.environ)
        allocation.narrow(rundir.stage_plan(stage), os.environ)
        works = {"prepare": prepare, "train": train, "export": export, "evaluate": evaluate}
        work = works[stage] if stage in works else importlib.import_module(f"jobs.{stage}").main
        words = str(work(rundir, life, stop))
        code = DONE
    except Interrupted as error:
        words, code = str(error), error.exit_code
    except FtError as error:
        words, code = "; ".join(error.messages), error.exit_code
        print(f"{stage} stopped:", *error.messages, sep="\n  ", flush=True)
    except Exception as error:  # the last resort: every end of a life leaves an outcome
        if not rundir.gone():
            traceback.print_exc()
        words, code = f"{type(error).__name__}: {error}", 1
    if gone := rundir.gone():  # whatever failed, failed of that
        print(f"{stage} stopped: {gone}", flush=True)
        return INPUT_WRONG
    if rank and code in outcome.OF_ANY_RANK:
        # srun ends the other ranks now, and rank 0 could not say why.
        words += f" (rank {rank} on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()})"
        outcome.create(rundir.outcomes, Outcome(stage, life, code, words))
        print(f"{stage}: {words}", flush=True)
    elif rank == 0:
        stands = outcome.settle(rundir.outcomes, Outcome(stage, life, code, words))
        if stands.code != code:
            words, code = stands.message, stands.code
        now = time.monotonic()
        ended = Ended(
            stage=stage, attempt=life, code=code, message=words, seconds=round(now - began, 1),
            signal_s=stop.at and round(now - stop.at, 2),
        )  # fmt: skip
        rundir.record(ended, writer=writer)
        print(f"{stage}: {words}", flush=True)
    return code


def _set_rank() -> int:
    """torch's rank variables from Slurm's; a single process has none of them."""
    world = int(os.environ.get("SLURM_NTASKS", "1"))
    if world == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        return 0
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(world)
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    from submitit import JobEnvironment

    # The first node of the list, resolved where the task runs; a port of the job's own below the ephemeral ones.
    # On a single node nobody else shall reach the processes.
    nodes = JobEnvironment().hostnames
    os.environ["MASTER_ADDR"] = nodes[0] if len(nodes) > 1 else "127.0.0.1"
    os.environ["MASTER_PORT"] = str(10_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)
    return int(os.environ["RANK"])


# -- the stages; each returns words for the outcome --------------------------------------------------------------------


def prepare(run: RunDir, life: int, stop: StopFlag) -> str:
    """Examples become a packed dataset that later runs reuse."""
    from ftlib.data.prepare import prepare
    from ftlib.sweepdir import share_prepared

    prepared = prepare(run, stop, model_commit=fetch_model(run, life, stop))
    # After prepared.json was written: who adds a sibling looks for it, so that none is missed.
    share_prepared(run, run.siblings())
    train = prepared["train"]
    found = "found" if prepared["reused"] else "packed"
    return f"{found} {train['examples']:,} examples in {train['rows']:,} rows, {prepared['test']:,} to test with"


def fetch_model(run: RunDir, attempt: int, stop: StopFlag) -> str | None:
    """See that a hub model's files are in the cache before any job holds a GPU; returns its commit.

    None: the model is a folder.
    """
    from ftlib import download, modelfiles

    name = run.provenance()["model_path"]
    if Path(name).is_absolute():
        return None
    fetched = download.fetch_model(
        name, run.spec().model.revision, cache=modelfiles.hub_cache(), owner=f"prepare of {run.path}", stop=stop,
        committed=lambda piece: events.progressed(run.path, "prepare", attempt, piece),
    )  # fmt: skip
    had = f"downloaded {fetched.downloaded_bytes / 1e9:.2f} GB" if fetched.downloaded_bytes else "all files are at hand"
    print(f"model: {name} at commit {fetched.commit[:12]}: {had}", flush=True)
    return fetched.commit


def train(run: RunDir, life: int, stop: StopFlag) -> str:
    """The training, on every rank."""
    return str(_loaded("ftlib.train.run", stop).train(run, life, stop))


def export(run: RunDir, life: int, stop: StopFlag) -> str:
    """Adapter and merged weights, and the proof that they are equal."""
    return str(_loaded("ftlib.export.run", stop).export(run, life, stop))


def _loaded(package: str, stop: StopFlag) -> ModuleType:
    from ftlib.interruptible import interruptible

    if os.environ.get("WORLD_SIZE", "1") == "1":  # one rank alone must not leave
        return interruptible(stop, lambda: importlib.import_module(package))
    return importlib.import_module(package)


def evaluate(run: RunDir, life: int, stop: StopFlag) -> str:
    """How good the tuned model is beside its base: the table, and the run's report."""
    from ftlib.evaluate.evaluate import evaluate
    from ftlib.report.page import evaluation_table, write_report
    from ftlib.report.plan import console
    from ftlib.train.watch import watched

    asked = run.stage_plan("evaluate")
    if asked["device"] == "cuda":
        from ftlib.train.arguments import check_gpus

        check_gpus("evaluate", asked)
    with watched(run, life, stop, "evaluate"):
        evaluation = evaluate(run, stop, attempt=life)
    console().print(evaluation_table(evaluation))
    report = write_report(run)
    base, tuned = evaluation["base"], evaluation["tuned"]
    both = (score for score in ("exact", "perplexity") if base[score] is not None and tuned[score] is not None)
    words = ", ".join(f"{score} {base[score]:.4g} -> {tuned[score]:.4g}" for score in both)
    return f"{words} on {tuned['n']} held-out pairs; the report is {report}"


if __name__ == "__main__":
    run(*sys.argv[1:])
