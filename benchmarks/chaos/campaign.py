"""Runs under kills, beside runs that nothing touched: what is killed where, and what came out."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos import processes, slurm
from benchmarks.chaos.kinds import KINDS, Kind, next_life_begun
from benchmarks.chaos.places import PLACES, View, stand_at
from ftlib import metrics
from ftlib.evaluate.evaluate import read_answers
from ftlib.rundir import RunDir
from ftlib.runs import outcome

STEPS, SAVE, EVAL, WARM_UP = 100, 10, 20, 0.12
SETTINGS = (
    f"train.steps={STEPS} train.save_every_steps={SAVE} train.eval_every_steps={EVAL} optim.warmup_share={WARM_UP} "
    "train.micro_batch=2 train.log_every_steps=20 data.pairs=600 data.seq_len=128 method.dropout=0.1 "
    # Batches enough for a kill to fall between two of them.
    "evaluate.pairs=48 evaluate.batch=8 evaluate.max_new_tokens=16 tracking.mode=disabled"
)
SEEN = {"save": SAVE, "eval": EVAL, "warmup": round(STEPS * WARM_UP)}
FLAVOURS = {
    "QLoRA, 1 rank": "",
    "DDP, 2 nodes x 1 rank": "resources.nodes=2",
    "ZeRO 3, 2 nodes x 1 rank": "resources.nodes=2 method.kind=full zero.stage=3 optim.lr=1e-3",
}
# In this order a run meets them, and between any two that cost a life without a new step there is one that saves.
ORDER = (
    ("prepare", "before the handler"),
    ("prepare", "data preparation"),
    ("train", "warm-up"),
    ("train", "imports"),
    ("train", "a step"),
    ("train", "model loading"),
    ("train", "accumulation"),
    ("train", "before the handler"),
    ("train", "checkpoint write"),
    ("train", "validation"),
    ("export", "before the handler"),
    ("export", "export"),
    ("evaluate", "answers of the base"),
    ("evaluate", "before the handler"),
    ("evaluate", "answers of the tuned model"),
)
COMPARED = ("step", "loss", "eval_loss", "lr", "grad_norm", "tokens")

# Never a wrong cause: where nothing tells the right one, this is it.
UNKNOWN = "unknown"
# A rank that never came is waited for ten minutes.
AWAY_S = 900


@dataclass
class Kill:
    """One kill, and what became of the life."""

    run: str
    flavour: str
    kind: str
    place: str
    stage: str
    life: int
    at_step: int = 0
    lost: int = 0
    away_s: float = 0.0  # from the kill to the next life's start
    cause: str = ""  # what `why` named
    right: bool = False  # the cause is the true one, or "unknown"


@dataclass
class Result:
    """A run that was killed, beside its reference."""

    run: str
    flavour: str
    state: str
    lives: int
    differences: list[str]
    kills: list[Kill] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Ended, and nothing differs."""
        return self.state == "completed" and not self.differences


class Ground:
    """A copy of the checkout with runs of its own, on the local cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("ftlib", "jobs", "slurm_templates", "models", "env"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(slurm.CHECKOUT / name, folder / name, ignore=ignored)
        self._number = 0

    def jobs(self, *words: str) -> str:
        """`python -m jobs WORDS` there; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "jobs", *words], cwd=self.folder, env=slurm.ENV, text=True, capture_output=True,
            timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise slurm.Trouble(f"jobs {' '.join(words)} exited {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, flavour: str, more: str = "") -> RunDir:
        """Queue a run with a cache of its own: every run prepares its data and loads its base itself."""
        self._number += 1
        cache = shlex.quote(f"cluster.cache={self.folder}/cache-{self._number}")
        settings = (
            f"{SETTINGS} {FLAVOURS[flavour]} cluster.qos={slurm.YIELDING} cluster.cpu_qos={slurm.YIELDING} "
            f"cluster.scheduler.slurm_conf={slurm.CONF} {cache} {more}"
        )
        runs = self.folder / "runs"
        before = {path.name for path in runs.glob("*")}
        self.jobs("submit", "--new", "--cluster", "local-slurm", "--set", settings)
        (name,) = {path.name for path in runs.glob("*") if not path.name.startswith(".")} - before
        return RunDir(runs / name)

    def cancel(self) -> None:
        """End what is left of the runs' jobs."""
        for path in (self.folder / "runs").glob("*/spec.json"):
            jobs = RunDir(path.parent).ledger().jobs.values()
            slurm.say("scancel", *jobs, check=False)

    def state(self, run: RunDir) -> dict[str, Any]:
        """`status --json` of one run."""
        (found,) = json.loads(self.jobs("status", "--json", "--run", run.name))["runs"]
        assert isinstance(found, dict)
        return found

    def finish(self, run: RunDir, timeout_s: float = 420) -> str:
        """Wait for the run's end; its state."""
        deadline = time.monotonic() + timeout_s
        while (now := self.state(run)["state"]) in ("queued", "running", "failed"):
            # A failed job may have a guard behind it.
            if now == "failed" and f"{run.name}.guard" not in slurm.say("squeue", "-h", "-o", "%j", check=False):
                return str(self.state(run)["state"])
            if time.monotonic() > deadline:
                return f"still {now} after {timeout_s:.0f} s"
            time.sleep(2)
        return str(now)

    def causes(self, run: RunDir) -> dict[tuple[str, int], str]:
        """What `why` names for each life: (stage, life) -> cause."""
        found: dict[tuple[str, int], str] = {}
        here: tuple[str, int] | None = None
        for line in self.jobs("why", "--run", run.name).splitlines():
            if life := re.match(r"  (\w+), life (\d+) ", line):
                here = life[1], int(life[2])
            elif here and (cause := re.match(r"    cause: ([^;]+);", line)):
                found[here] = cause[1]
        return found


def differences(run: RunDir, reference: RunDir) -> list[str]:
    """In what a run differs from the uninterrupted one; empty when in nothing."""
    found = []
    ours, theirs = (
        [{key: row[key] for key in COMPARED if key in row} for row in metrics.read_metrics(r.metrics_file)]
        for r in (run, reference)
    )
    steps = [row["step"] for row in ours if "loss" in row]
    if steps != list(range(1, STEPS + 1)):
        found.append(f"steps: {len(steps)} rows of {len(set(steps))} steps, not {STEPS}")
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            keys = [key for key in COMPARED if mine.get(key) != other.get(key)]
            found.append(f"step {other['step']}: {', '.join(f'{k} {mine.get(k)} not {other.get(k)}' for k in keys)}")
            break
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} rows, not {len(theirs)}")
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        if _sha(run.export / name) != _sha(reference.export / name):
            found.append(f"export/{name} differs")
    for path in ("evaluation.json", "export/equality.json"):
        if _json(run.path / path) != _json(reference.path / path):
            found.append(f"{path} differs")
    for subject in ("base", "tuned"):
        if _answers(run, subject) != _answers(reference, subject):
            found.append(f"evaluation/{subject}.jsonl: other answers")
    return found


def _json(path: Path) -> dict[str, Any]:
    """What a file of results says, but for how long it took; empty without the file."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: value for key, value in values.items() if key != "seconds"}


def _answers(run: RunDir, subject: str) -> dict[int, Any]:
    """What a model answered, by question, with its likelihoods; a line that a kill cut short does not count."""
    return read_answers(run.path / "evaluation" / f"{subject}.jsonl")


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def schedule(count: int, random: Random) -> list[tuple[str, str, str, str]]:
    """(flavour, kind, stage, place) to be done: kinds and places in turn, so that each kind meets many places. The
    places are taken from the last one on, so that a short campaign has kills in evaluation and export, too."""
    kinds, found = list(KINDS), []
    random.shuffle(kinds)
    for number, (turn, at) in enumerate(product(range(10**6), reversed(range(len(ORDER))))):
        flavour = list(FLAVOURS)[turn % len(FLAVOURS)]
        stage, place = ORDER[at]
        found.append((flavour, kinds[(at + 3 * turn + turn // 10) % len(kinds)], stage, place))
        if number + 1 == count:
            return found
    raise AssertionError


def attack(
    ground: Ground, flavour: str, wanted: Iterable[tuple[str, str, str]], random: Random
) -> tuple[RunDir, list[Kill]]:
    """One run, killed at each wanted (kind, stage, place) that can be met, in the run's order."""
    run = ground.submit(flavour)
    done = []
    for kind_name, stage, place_name in sorted(wanted, key=lambda w: ORDER.index((w[1], w[2]))):
        kind, place = KINDS[kind_name], PLACES[place_name]
        view = stand_at(run, place, stage, SEEN)
        if view is None:
            _note(run, f"{stage} ended before {place_name!r}: {kind_name!r} is left for another run")
            continue
        done.append(_strike(run, flavour, kind, place_name, view, random))
    return run, done


def _strike(run: RunDir, flavour: str, kind: Kind, place: str, view: View, random: Random) -> Kill:
    kill = Kill(run.name, flavour, kind.name, place, view.stage, view.life)
    if view.stage == "train":
        kill.at_step = max(view.last_step(), view.from_step())
    began = time.monotonic()
    kind.do(view, random)
    try:
        slurm.until(lambda: next_life_begun(view), AWAY_S, "the next life", pause_s=0.1)
    except slurm.Trouble as trouble:
        _note(run, f"{kind.name} at {place}: {trouble}")
    finally:
        processes.thaw(view.workers)
    kill.away_s = round(time.monotonic() - began, 1)
    where = f"{view.stage} life {view.life}, step {kill.at_step}"
    _note(run, f"{kind.name:26} {place:20} {where}; away {kill.away_s:.0f} s")
    return kill


def judge(ground: Ground, run: RunDir, flavour: str, kills: list[Kill], reference: RunDir) -> Result:
    """What came out, once the run has ended."""
    ended = ground.finish(run)
    causes = ground.causes(run)
    for kill in kills:
        kill.cause = causes.get((kill.stage, kill.life), "none")
        kill.right = kill.cause in (KINDS[kill.kind].cause, UNKNOWN)
        if any(end.attempt == kill.life and end.code == 0 for end in outcome.read(run.outcomes, kill.stage)):
            kill.cause, kill.right = "it went on to its end", True
        kill.lost = _lost(run, kill)
    lives = len(list(run.lives.glob("*")))
    found = differences(run, reference) if ended == "completed" else []
    return Result(run.name, flavour, ended, lives, found, kills)


def _lost(run: RunDir, kill: Kill) -> int:
    """Steps the killed life had recorded and a later one did again."""
    if kill.stage != "train":
        return 0
    last, again = 0, []
    for line in run.metrics_file.read_text(errors="replace").splitlines():
        row = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
        if "loss" in row and row["life"] == kill.life:
            last = max(last, row["step"])
        elif "loss" in row and row["life"] > kill.life:
            again.append(row["step"])
    return max(0, last + 1 - min(again)) if last and again else 0


def _note(run: RunDir, words: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {run.name}: {words}", flush=True)
