"""How much work is left over after 30 kills: this project, what the measured costs allow, and submitit with a Trainer.

An hour of a cluster is a second here: kills come every 5 s on average, and the site's prior of one in 24 h is one in
24 s. Of ten kills four are announced (SIGTERM or SIGUSR2, two seconds of grace), six are not (SIGKILL). Both contenders
train the same tiny model on the same rows and meet the same kills at the same times of the clock; a life is a fork of a
process that has imported the libraries, so a start is short, as the rest is.

The peer is submitit with transformers.Trainer: submitit's worker with its signal handlers runs the Trainer, which has
its own checkpoints and its own resume; it is started again after each kill. It is told the save interval that is the
best for this trace by costs measured before it; ours finds its own. "Allowed" is the work that the best constant
interval, known in hindsight, would keep of this trace with our mean save, start and step times, warnings used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from submitit.core.submission import process_job
from submitit.core.utils import DelayedSubmission

from benchmarks.lives import environment, prepared_run, print_or_dump, print_table
from ftlib import checkpoint
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved, FirstStep, Resumed
from jobs import wish as wishes

GRACE_S = 2.0
SCALE_H = 1 / 3600
GOAL = 0.95


@dataclass(frozen=True)
class Kill:
    """When, in seconds from the trace's start, and by which signal."""

    at: float
    number: int

    @property
    def announced(self) -> bool:
        return self.number != signal.SIGKILL


def trace(kills: int, mean_s: float, seed: int) -> list[Kill]:
    """Gaps are drawn from an exponential distribution, no shorter than a fifth of their mean."""
    draw, at, found = random.Random(seed), 0.0, []
    kinds = [signal.SIGKILL] * 6 + [signal.SIGTERM] * 2 + [signal.SIGUSR2] * 2
    for _ in range(kills):
        at += max(mean_s / 5, draw.expovariate(1 / mean_s))
        found.append(Kill(at, draw.choice(kinds)))
    return found


def allowed_steps(kills: list[Kill], save_s: float, start_s: float, step_s: float, every: int) -> int:
    """Steps kept by a training that saves every so many steps, and on each warning."""
    kept, now = 0, 0.0
    for kill in kills:
        at, done, last = now + start_s, kept, kept
        while at + step_s <= kill.at:
            at, done = at + step_s, done + 1
            if (done - kept) % every == 0:
                if at + save_s > kill.at:
                    break
                at, last = at + save_s, done
        if kill.announced and now + start_s <= kill.at:
            last, now = done, max(at, kill.at) + save_s
        else:
            now = kill.at
        kept = last
    return kept


def fork(work: Callable[[], None], log: Path, variables: dict[str, str]) -> int:
    """A child that does `work` with its own environment and log; returns its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os.environ.update(variables)
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
    finally:
        os._exit(1)


@dataclass
class Trial:
    """One contender's way through the trace, by a clock that runs only while it does."""

    start: Callable[[int], int]
    clock: float = 0.0

    def suffer(self, life: int, kill: Kill) -> None:
        """One life, until its kill has ended it."""
        began = time.monotonic() - self.clock
        pid = self.start(life)
        while time.monotonic() - began < kill.at:
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise SystemExit(f"life {life} ended by itself; see the log")
            time.sleep(0.005)
        os.kill(pid, kill.number)
        end = time.monotonic() + GRACE_S
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        self.clock = time.monotonic() - began


class Ours:
    """A run of this project."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.run = prepared_run(folder / "a-run", settings, kill_every_h=24 * SCALE_H)
        # The code that is imported before the fork is the checkout's; the snapshot is the same to the byte.
        shutil.rmtree(self.run.code)
        self.run.code.symlink_to(wishes.CHECKOUT)

    def start(self, life: int) -> int:
        from jobs import stage

        run = self.run
        (run.lives / f"train-{life}").write_text(f"0 here {int(time.time())}\n", encoding="utf-8")

        def work() -> None:
            os.chdir(run.code)
            stage.run(str(run.path), "train")

        return fork(work, run.slurm / "train.log", environment(run, life))

    def kept(self) -> int:
        folder, _ = checkpoint.newest(self.run.checkpoints, run=self.run.name)
        return checkpoint.step_of(folder) if folder else 0

    def lives(self) -> tuple[dict[int, int], dict[int, int]]:
        """The step each life began after, and the last one it made."""
        began = {resumed.attempt: resumed.step for resumed in self.run.ledger().of(Resumed)}
        last: dict[int, int] = {}
        for line in self.run.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            last[row["life"]] = max(row["step"], last.get(row["life"], 0))
        return began, last

    def costs(self) -> dict[str, float]:
        """What a save, a start and a step took on average, in seconds: so many of them fit into the trace."""
        known = self.run.ledger()
        saves = known.of(CheckpointSaved)
        starts = [sum(first_step.parts_s.values()) for first_step in known.of(FirstStep)]
        saved = {(event.attempt, event.step) for event in saves}
        lines = self.run.metrics_file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line[-1:] == "}"]
        at = [(row["life"], row["step"], datetime.datetime.fromisoformat(row["time"]).timestamp()) for row in rows]
        # From row to row: with all that is done around a step, but without saves.
        steps = [b[2] - a[2] for a, b in pairwise(at) if (a[0], a[1] + 1) == b[:2] and a[:2] not in saved]
        means = {"save_s": [event.seconds for event in saves], "start_s": starts, "step_s": steps}
        return {name: statistics.fmean(values) for name, values in means.items()}


def best_interval(kills: list[Kill], costs: dict[str, float]) -> tuple[int, int]:
    """The most steps that a constant interval keeps of this trace, and that interval in steps."""
    return max((allowed_steps(kills, **costs, every=every), every) for every in range(1, 2000))


class Peer:
    """transformers.Trainer with its own checkpoints as submitit's job, on the rows and the model of `run`."""

    def __init__(self, folder: Path, run: RunDir, save_steps: int) -> None:
        self.folder, self.run, self.save_steps = folder, run, save_steps
        folder.mkdir()
        self.progress = folder / "progress"
        submission = DelayedSubmission(self)
        submission.set_timeout(timeout_min=60, max_num_timeout=1000)
        submission.dump(folder / "1_submitted.pkl")

    def start(self, life: int) -> int:
        worker = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_GLOBALID": "0"}
        variables = {**environment(self.run, life), **worker}
        return fork(lambda: process_job(self.folder), self.folder / "log", variables)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit asks for before it requeues: the same again. The Trainer resumes by itself."""
        return DelayedSubmission(self)

    def __call__(self) -> None:
        import torch
        from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

        from ftlib.data.dataset import PackedRows
        from ftlib.train.model import attach_adapter, load_base

        spec, numerics = self.run.spec(), self.run.numerics()
        torch.set_num_threads(numerics.threads)
        life = os.environ["FT_LIFE"]
        set_seed(spec.train.seed)
        base = load_base(spec, self.run.provenance()["model_path"], torch.device("cpu"))
        progress = self.progress.open("a", buffering=1)

        class Note(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.write(f"{life} began {state.global_step}\n")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.write(f"{life} step {state.global_step}\n")

        arguments = TrainingArguments(
            output_dir=str(self.folder / "out"), max_steps=spec.train.steps or 1, use_cpu=True,
            per_device_train_batch_size=numerics.micro_batch, gradient_accumulation_steps=numerics.accumulation,
            learning_rate=spec.optim.lr, lr_scheduler_type=spec.optim.schedule, optim=spec.optim.name,
            save_strategy="steps", save_steps=self.save_steps, save_total_limit=2, logging_steps=50,
            remove_unused_columns=False, disable_tqdm=True, report_to="none", seed=spec.train.seed)  # fmt: skip
        rows = PackedRows(Path(self.run.prepared()["dataset"]) / "train")
        trainer = Trainer(
            model=attach_adapter(base, spec.method, spec.train.seed), args=arguments, train_dataset=rows,
            callbacks=[Note()])  # fmt: skip
        trainer.train(resume_from_checkpoint=self._latest())

    def _latest(self) -> str | None:
        """The newest checkpoint; one that was cut short is thrown away, as its user would do in the end."""
        from transformers.trainer_utils import get_last_checkpoint

        while (self.folder / "out").exists() and (found := get_last_checkpoint(str(self.folder / "out"))):
            if self._whole(Path(found)):
                return found
            shutil.rmtree(found)
        return None

    @staticmethod
    def _whole(folder: Path) -> bool:
        # The Trainer writes this one last.
        return (folder / "trainer_state.json").exists() and (folder / "rng_state.pth").exists()

    def kept(self) -> int:
        found = self._latest()
        return int(found.rsplit("-", 1)[1]) if found else 0

    def lives(self) -> tuple[dict[int, int], dict[int, int]]:
        began, last = {}, {}
        for line in self.progress.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if len(words) == 3:
                (began if words[1] == "began" else last)[int(words[0])] = int(words[2])
        return began, last


def lost_on_warning(kills: list[Kill], began: dict[int, int], last: dict[int, int]) -> list[int]:
    """Steps done before an announced kill and done again after it, one number a kill."""
    lost = []
    for life, kill in enumerate(kills, 1):
        later = [began[n] for n in sorted(began) if n > life]
        if kill.announced and life in last and later:
            lost.append(max(0, last[life] - later[0]))
    return lost


def measure(folder: Path, kills: list[Kill]) -> dict[str, Any]:
    """Both contenders through the trace, a life of one and a life of the other in turn."""
    import ftlib.train.run  # noqa: F401  (imported once, before the forks)

    settings = "train.steps=100000 train.global_batch=2 data.pairs=600 tracking.mode=disabled"
    trying = Ours(folder / "trying", f"{settings} train.save_every_steps=20")
    Trial(trying.start).suffer(1, Kill(15.0, signal.SIGTERM))
    ours = Ours(folder, settings)
    peer = Peer(folder / "peer", ours.run, best_interval(kills, trying.costs())[1])
    trials = Trial(ours.start), Trial(peer.start)
    for life, kill in enumerate(kills, 1):
        for trial in trials:
            trial.suffer(life, kill)
    costs = ours.costs()
    allowed, every = best_interval(kills, costs)
    found: dict[str, Any] = {"kills": len(kills), "announced": sum(kill.announced for kill in kills), **costs}
    found |= {"allowed": allowed, "allowed_every": every, "peer_every": peer.save_steps, "goal": GOAL}
    for name, contender, trial in (("ours", ours, trials[0]), ("peer", peer, trials[1])):
        kept, lost = contender.kept(), lost_on_warning(kills, *contender.lives())
        found[name] = {
            "steps": kept, "of_allowed": kept / allowed, "seconds": trial.clock, "lost_on_warning": sum(lost),
            "warned": len(lost), "steps_per_s": kept / trial.clock}  # fmt: skip
    return found


def show(found: dict[str, Any]) -> None:
    rows = [(f"allowed (a save every {found['allowed_every']} steps)", str(found["allowed"]), "1.00", "", "")]
    for name, words in (("ours", "this project"), ("peer", f"submitit + Trainer, every {found['peer_every']} steps")):
        one = found[name]
        rows.append((words, str(one["steps"]), f"{one['of_allowed']:.2f}", f"{one['steps_per_s']:.2f}",
                     f"{one['lost_on_warning']} in {one['warned']}"))  # fmt: skip
    title = f"{found['kills']} kills, {found['announced']} of them announced"
    print_table(title, ("", "steps kept", "of allowed", "steps/s", "steps lost on a warning"), rows)
    print(
        f"measured: a save {found['save_s']:.3f} s, a start {found['start_s']:.2f} s, a step {found['step_s']:.3f} s; "
        f"goal: at least {GOAL} of allowed, more than the peer, 0 lost on a warning")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--mean-s", type=float, default=5.0, help="mean seconds between kills")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--json", action="store_true")
    said = options.parse_args()
    wishes.RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wishes.RUNS, prefix=".bench-") as folder:
        found = measure(Path(folder), trace(said.kills, said.mean_s, said.seed))
    print_or_dump(found, said.json, show)


if __name__ == "__main__":
    main()
