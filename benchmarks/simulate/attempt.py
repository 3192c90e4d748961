"""What a step does: one attempt of a stage that loads, restores, works, saves, and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftlib.runs import overrides
from ftlib.runs.events import CheckpointSaved, Progress, Resumed
from ftlib.runs.outcome import Outcome

if TYPE_CHECKING:
    from benchmarks.simulate.world import Truth, World

# Steps of one piece of work, after which it is saved.
STEPS = 10
# How often an attempt looks whether a later one has begun.
POLL_S = 5.0
SUPERSEDED = 70
# Until then a signal ends the program: its handlers do not stand yet.
HANDLERS_S = 10.0
UNHANDLED = {"TERM": (143, "Terminated"), "USR2": (140, "User defined signal 2")}
# Cause -> exit code, outcome's message ("" without an outcome), line of the log.
FATES = {
    "idle GPU": (75, "interrupted (idle GPU), saved at step 1", ""),
    "host memory": (137, "", "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0."),
    "GPU memory": (1, "OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory."),
    "bad GPU": (76, "this node's GPU is faulty", ""),
    "collective": (1, "DistBackendError: NCCL error", "Watchdog caught collective operation timeout"),
    "disk full": (64, "the checkpoint could not be written, with: No space left on device", ""),
    "input": (64, "data.path: no such file", ""),
    "code": (1, "ValueError: no", "ValueError: no"),
    "container": (255, "", "FATAL:   container creation failed"),
    "transient": (1, "OSError: [Errno 116] Stale file handle", "OSError: [Errno 116] Stale file handle"),
    "killed": (137, "", ""),
}


class _Ended(Exception):
    def __init__(self, code: int, report: str = "") -> None:
        """report: srun's, where the program did not exit by itself."""
        self.code: int = code
        self.report: str = report


def supersede(world: World, truth: Truth) -> None:
    """A later attempt has begun: this one, should it still be at work, notices that within its poll."""
    if truth.process is not None and truth.process.alive:
        world.kernel.push(POLL_S * world.kernel.me.random.random(), truth.process.signal, "SUPERSEDED")


def exit_code(truth: Truth) -> int:
    """What srun returns of an attempt that has ended."""
    process = truth.process
    assert process is not None
    return int(process.result) if process.result is not None else 137


def run(world: World, truth: Truth) -> int:
    """One attempt; its exit code. Where it is killed, nothing else is left of it."""
    try:
        _work(world, truth)
        _outcome(world, truth, 0, "done")
    except _Ended as end:
        _log(world, truth, end.report or _exited(truth, end.code))
        return end.code
    except OSError as error:
        truth.causes.add("disk full")
        _log(world, truth, f"OSError: [Errno 28] {error.strerror}", _exited(truth, 1))
        return 1
    return 0


def _work(world: World, truth: Truth) -> None:
    scenario, files, stage = world.scenario, world.files, truth.stage
    writer = f"{stage}-{truth.number}"
    if world.fates:
        truth.fate = world.fates.pop(0)
    warned = _wait(world, truth, scenario.load_s)
    _own_fate(world, truth)
    truth.restored = files.newest_step(stage)
    truth.restored_at = world.kernel.now
    store = world.store()
    if stage == "train":
        store.record(Resumed(stage=stage, attempt=truth.number, step=truth.restored), writer=writer)
    step, total = truth.restored, STEPS * (scenario.pieces if stage == "train" else max(1, scenario.pieces // 3))
    while step < total:
        began = world.kernel.now
        until = STEPS - step % STEPS
        if warned is None:
            warned = _wait(world, truth, scenario.piece_s * until / STEPS)
        made = int(until * (world.kernel.now - began) / (scenario.piece_s * until / STEPS))
        step += max(1, made) if warned is None or made else 0
        step = min(step, total)
        if step > truth.restored and (step % STEPS == 0 or warned is not None):
            _wait(world, truth, scenario.save_s, saving=True)
            world.on_commit(truth, step)
            files.commit(stage, step, truth.number)
            if stage == "train":
                store.record(CheckpointSaved(stage=stage, attempt=truth.number, step=step), writer=writer)
            else:
                store.record(Progress(stage=stage, attempt=truth.number, piece=str(step)), writer=writer)
        if warned is not None and step < total:
            word = "time limit" if warned == "USR2" else "preemption"
            _outcome(world, truth, 75, f"interrupted ({word}), saved at step {step}")
            raise _Ended(75)


def _own_fate(world: World, truth: Truth) -> None:
    """What ends the attempt for its own request: a GPU that is faulty, memory that does not suffice."""
    scenario = world.scenario
    now = overrides.fold(world.files.now_ledger().events, world.kernel.now)
    if truth.node == scenario.bad_node:
        _die(world, truth, "bad GPU")
    if truth.job.mem_mib < scenario.needed_mib:
        _die(world, truth, "host memory")
    if truth.stage == "train" and (now.micro_batch or scenario.micro_batch) > scenario.fitting_micro_batch:
        _die(world, truth, "GPU memory")


def _wait(world: World, truth: Truth, seconds: float, *, saving: bool = False) -> str | None:
    """Work for so long; the signal that asks it to stop, if one came."""
    kernel = world.kernel
    process = kernel.me
    end = kernel.now + seconds
    fate, truth.fate = truth.fate, ""
    if fate:
        kernel.pause(seconds * process.random.random())
        _die(world, truth, fate)
    warned = None
    while True:
        while process.signals:
            signal = process.signals.pop(0)
            if signal == "SUPERSEDED":
                raise _Ended(SUPERSEDED)
            if signal.startswith("DIE "):
                _die(world, truth, signal.removeprefix("DIE "))
            if kernel.now - (truth.srun_began or kernel.now) < HANDLERS_S:
                code, how = UNHANDLED[signal]
                raise _Ended(code, f"srun: error: {truth.node}: task 0: {how}")
            warned = warned or signal
        if kernel.now >= end or (warned is not None and not saving):
            return warned
        kernel.pause(end - kernel.now, wakeable=True)


def _log(world: World, truth: Truth, *lines: str) -> None:
    world.log(truth.stage, truth.job.id).extend(lines)


def _exited(truth: Truth, code: int) -> str:
    """srun's report of a rank that ended with an error."""
    return f"srun: error: {truth.node}: task 0: Exited with exit code {code}"


def _die(world: World, truth: Truth, cause: str) -> None:
    code, message, line = FATES[cause]
    truth.causes.add(cause)
    if line:
        _log(world, truth, line)
    if cause == "host memory":
        truth.job.out_of_memory = True
    if message:
        _outcome(world, truth, code, message)
    raise _Ended(code, f"srun: error: {truth.node}: task 0: Killed" if cause == "killed" else "")


def _outcome(world: World, truth: Truth, code: int, message: str) -> None:
    world.kernel.me.signals = [signal for signal in world.kernel.me.signals if signal != "SUPERSEDED"]
    world.files.end_attempt(Outcome(truth.stage, truth.number, code, message))
