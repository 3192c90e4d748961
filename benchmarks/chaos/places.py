"""Where a kill may fall. Each place is found from outside, in the run folder's files and in /proc; then all ranks are
stopped (SIGSTOP), and it is looked again whether they stand there. No hook in the product, no guess by the clock,
save for the middle of an accumulation."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos import processes
from benchmarks.chaos.processes import Worker
from ftlib import checkpoint
from ftlib.atomic import TEMPORARY
from ftlib.rundir import RunDir
from ftlib.runs import outcome
from ftlib.runs.events import Cancelled, Decided, Resumed

# A life has then trained past its first periodic save: what a run may lose again and again, without an end.
PAST_A_SAVE = 2


@dataclass
class View:
    """A life of a stage, seen from outside."""

    run: RunDir
    stage: str
    life: int
    settings: dict[str, int]
    workers: list[Worker] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Rank 0's process."""
        return self.workers[0].pid

    def began(self) -> float:
        """When the life began, in seconds since 1970."""
        return float(self.run.ledger().attempt(self.stage, self.life).began)

    def started(self) -> bool:
        """Whether the stage's own code runs."""
        path = self.run.events / f"{self.stage}-{self.life}.jsonl"
        return path.exists() and '"started"' in path.read_text()

    def from_step(self) -> int:
        """Where this life went on."""
        resumed = self.run.ledger().last(Resumed, self.stage, self.life)
        return resumed.step if resumed else 0

    def log(self) -> str:
        """This life's part of rank 0's log."""
        attempt = self.run.ledger().attempt(self.stage, self.life)
        path = self.run.slurm / self.stage / f"{attempt.job_id}_0_log.out"
        start = attempt.log_starts.get(path.name, 0)
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def last_row(self) -> dict[str, Any]:
        """The newest whole row that this life wrote."""
        for row in reversed(raw_rows(self.run.metrics_file)):
            if row["life"] == self.life:
                return row
        return {}

    def last_step(self) -> int:
        """The last optimizer step this life has recorded; 0 before its first."""
        return int(self.last_row().get("step", 0))


def raw_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl as they stand there; half-written ones left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        if line.startswith("{") and line.endswith("}"):
            found.append(json.loads(line))
    return found


def _temporary(folder: Path, start: str = "") -> bool:
    return any(path.name.startswith(TEMPORARY + start) for path in folder.glob(f"{TEMPORARY}*"))


def _before_handler(view: View) -> bool:
    return not processes.catches(view.pid, signal.SIGUSR2)


def _imports(view: View) -> bool:
    return view.started() and processes.mapped(view.pid, "libtorch") and not processes.mapped(view.pid, "bitsandbytes")


def _loading(view: View) -> bool:
    if not processes.mapped(view.pid, "bitsandbytes"):
        return False
    log = view.log()
    begun = processes.mapped(view.pid, ".safetensors") or "base model:" in log
    return begun and "training " not in log


def _preparation(view: View) -> bool:
    return view.started() and _temporary(Path(view.run.provenance()["cache"]) / "datasets")


def _warm_up(view: View) -> bool:
    return 1 <= view.last_step() < view.settings["warmup"]


def _far(view: View) -> bool:
    """Past the warm-up, and past a save of this life."""
    step = view.last_step()
    saves = step // view.settings["save"] - view.from_step() // view.settings["save"]
    return saves >= 1 and step > view.settings["warmup"] and step % view.settings["save"] >= PAST_A_SAVE


def _between_steps(view: View) -> bool:
    return _far(view)


def _in_accumulation(view: View) -> bool:
    row = view.last_row()
    if not _far(view) or "seconds" not in row:
        return False
    time.sleep(0.5 * row["seconds"])
    return view.last_row() == row


def _saving(view: View) -> bool:
    return view.last_step() > view.settings["warmup"] and _temporary(view.run.checkpoints, "step-")


def _validating(view: View) -> bool:
    row = view.last_row()
    step = int(row.get("step", 0))
    if not step or step % view.settings["eval"] or "eval_loss" in row:
        return False
    return checkpoint.folder_for(view.run.checkpoints, step).exists()


def _exporting(view: View) -> bool:
    return view.started() and (view.run.export / ".unfinished").exists()


def _answers(view: View, subject: str) -> tuple[int, float]:
    """How many answers of a model (base or tuned) are kept, and when the last was (seconds since 1970)."""
    path = view.run.path / "evaluation" / f"{subject}.jsonl"
    try:
        return path.read_bytes().count(b"\n"), path.stat().st_mtime
    except FileNotFoundError:
        return 0, 0.0


def _answering_base(view: View) -> bool:
    """This attempt has kept answers of the base, and the tuned model has none yet."""
    kept, at = _answers(view, "base")
    return kept > 0 and at > view.began() + 1 and _answers(view, "tuned")[0] == 0


def _answering_tuned(view: View) -> bool:
    """This attempt has kept answers of the tuned model, and more are to come."""
    kept, at = _answers(view, "tuned")
    return 0 < kept < _answers(view, "base")[0] and at > view.began() + 1


@dataclass(frozen=True)
class Place:
    """A moment in a stage, and how to know it."""

    name: str
    stages: tuple[str, ...]
    reached: Callable[[View], bool]


PLACES = {
    place.name: place
    for place in (
        Place("before the handler", ("prepare", "train", "export", "evaluate"), _before_handler),
        Place("data preparation", ("prepare",), _preparation),
        Place("imports", ("train",), _imports),
        Place("model loading", ("train",), _loading),
        Place("warm-up", ("train",), _warm_up),
        Place("a step", ("train",), _between_steps),
        Place("accumulation", ("train",), _in_accumulation),
        Place("checkpoint write", ("train",), _saving),
        Place("validation", ("train",), _validating),
        Place("export", ("export",), _exporting),
        Place("answers of the base", ("evaluate",), _answering_base),
        Place("answers of the tuned model", ("evaluate",), _answering_tuned),
    )
}


def stand_at(run: RunDir, place: Place, stage: str, settings: dict[str, int], timeout_s: float = 240) -> View | None:
    """Wait until a life of `stage` is at the place and stop all its ranks there. None: the stage ended before."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        life = max((int(p.name.rpartition("-")[2]) for p in run.lives.glob(f"{stage}-*")), default=0)
        if outcome.done(run.outcomes, stage) or _given_up(run, stage):
            return None
        if life == 0:
            time.sleep(0.005)
            continue
        view = View(run, stage, life, settings)
        if not _caught(view, place, deadline):
            time.sleep(0.005)
            continue
        return view
    return None


def _caught(view: View, place: Place, deadline: float) -> bool:
    """Follow one life until it ends or stands at the place, stopped."""
    world = view.run.numerics().world_size if view.stage == "train" else 1
    needed = 1 if place.name == "before the handler" else world
    over = (view.run.outcomes / f"{view.stage}-{view.life}", view.run.lives / f"{view.stage}-{view.life + 1}")
    while time.monotonic() < deadline:
        if len(view.workers) < needed:
            view.workers = processes.workers(view.run.path, view.stage, view.life)
            if any(path.exists() for path in over):
                return False
            time.sleep(0.003)
            continue
        if not Path(f"/proc/{view.pid}").exists():
            return False
        if place.reached(view):
            if processes.freeze(view.workers) and place.reached(view):
                return True
            processes.thaw(view.workers)
            if place.name == "before the handler":
                return False
        time.sleep(0.002)
    return False


def _given_up(run: RunDir, stage: str) -> bool:
    """An epilogue or the guard has stopped the stage; a life that only says itself that it failed may be requeued."""
    known = run.ledger()
    return bool(known.of(Cancelled, stage)) or any(event.choice == "stop" for event in known.of(Decided, stage))
