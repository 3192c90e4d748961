"""What is compared: a short run of every method, one that is stopped and resumed, and the scripts of every recipe."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from benchmarks.methods import METHODS
from benchmarks.methods import SHORT as SHORT_TRAINING
from benchmarks.same_as import trees
from benchmarks.same_as.results import Parts, of_dry_run, of_run, steps_recorded
from benchmarks.same_as.trees import Ended, Trouble

SHORT = f"{SHORT_TRAINING} train.eval_every_steps=4 train.log_every_steps=4 evaluate.max_new_tokens=8 "
ZERO = (
    "train.micro_batch=1 data.template=brief data.seq_len=256 data.pairs=200 train.gradient_checkpointing=false "
    "optim.weight_decay=0.1"
)
# Long enough for a stop signal to arrive before the end.
RESUMED_STEPS, STOP_AFTER = 60, 6
PROFILES = {"a100": "", "hipergator": "cluster.account=lab", "local-slurm": ""}
# Where the recipe's dataset is on the hub: a sample file in its place.
SAMPLES = {"llama3-8b": "alpaca.jsonl", "llama-7b-alpaca": "alpaca.jsonl", "falcon-7b": "oasst_trees.jsonl"}
EVERYTHING = (
    "cluster.exclude=bad1 cluster.mail_user=ada@example.org cluster.modules=[cuda] cluster.environment.TZ=UTC "
    "cluster.container.module=apptainer cluster.container.image=/images/train.sif resources.nodes=2"
)


@dataclass(frozen=True)
class Training:
    """A short run of all stages, here, on one CPU."""

    name: str
    recipe: str
    settings: str
    stop_after: int | None = None  # told to stop after so many steps, and resumed

    def parts(self, tree: Path, cpu: int) -> Parts:
        """Carry it out in `tree`, which is its own; what came out."""
        words = ["submit", "--model", self.recipe, "--cluster", "local", "--set", self.settings]
        process = trees.start(tree, words, cpu)
        if self.stop_after is None:
            ended = trees.wait(process)
        else:
            _stop_after_step(tree, process, self.stop_after)
            if (ended := trees.wait(process)).code == 75:
                ended = trees.run(tree, ["resume", "--run", _only_run(tree).name], cpu)
            else:
                ended = Ended(ended.code or 1, ended.stdout, f"it was not stopped in time\n{ended.stderr}")
        if ended.code:
            return _failure(ended, tree)
        return {"exit code": 0, **of_run(_only_run(tree))}


@dataclass(frozen=True)
class DryRun:
    """The scripts of a run or sweep, as they would be queued."""

    name: str
    words: tuple[str, ...]

    def parts(self, tree: Path, cpu: int) -> Parts:
        """What `tree` would queue."""
        ended = trees.run(tree, [*self.words, "--dry-run"], cpu)
        if ended.code:
            return _failure(ended, tree)
        return {"exit code": 0, **of_dry_run(ended.stdout, tree)}


Case = Training | DryRun


def _failure(ended: Ended, tree: Path) -> Parts:
    last_lines = (ended.stdout + ended.stderr).replace(str(tree), "/checkout").strip().splitlines()[-15:]
    return {"exit code": ended.code, "message": "\n".join(last_lines)}


def _only_run(tree: Path) -> Path:
    runs = [file.parent for file in (tree / "runs").glob("*/spec.json")]
    if len(runs) != 1:
        raise Trouble(f"{tree}/runs: {len(runs)} runs where there must be one")
    return runs[0]


def _stop_after_step(tree: Path, process: Popen[str], step: int) -> None:
    """SIGTERM to the command in the foreground, which asks the stage to save, once `step` is recorded."""
    deadline = time.monotonic() + trees.COMMAND_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        runs = list((tree / "runs").glob("*/metrics.jsonl"))
        if runs and steps_recorded(runs[0].parent) >= step:
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.02)


def trainings() -> list[Case]:
    """A short run of every method."""
    found: list[Case] = []
    for name, (recipe, settings) in METHODS.items():
        found.append(Training(name, recipe, SHORT + settings))
    found += [Training(f"full, ZeRO {stage}", f"tiny-zero{stage}", f"{SHORT} {ZERO}") for stage in (2, 3)]
    found.append(Training("tiny", "tiny", f"{SHORT} data.pairs=200"))
    recipe, settings = METHODS["qlora"]
    resumed = f"{SHORT} {settings} train.steps={RESUMED_STEPS}"
    found.append(Training("qlora, stopped and resumed", recipe, resumed, stop_after=STOP_AFTER))
    return found


def dry_runs(recipes: list[str], samples: Path) -> list[Case]:
    """The scripts of each recipe on each profile, of one with all that a profile can say, and of a sweep's arrays.
    samples: a folder outside both trees, because a data file's path is part of a run's id."""
    found: list[Case] = []
    for recipe in recipes:
        for profile, settings in PROFILES.items():
            words = ["submit", "--model", recipe, "--cluster", profile]
            if recipe in SAMPLES:
                words += ["--data", str(samples / SAMPLES[recipe])]
                settings = f"{settings} data.held_out=0.3".strip()
            words += ["--set", settings]
            found.append(DryRun(f"{recipe} on {profile}", tuple(words)))
    everything = ("submit", "--model", "llama2-7b", "--cluster", "hipergator", "--set")
    found.append(DryRun("llama2-7b on hipergator, every field", (*everything, f"cluster.account=lab {EVERYTHING}")))
    for profile, settings in PROFILES.items():
        words = ["sweep", "--sweep", "seeds", "--model", "llama2-7b", "--cluster", profile, "--set", settings]
        found.append(DryRun(f"sweep of llama2-7b on {profile}", tuple(words)))
    return found
