"""What runs and sweeps are doing: a row each, from their folders' files and what Slurm says. Made to be printed
(board.py) and for programs (`status --json`, whose fields are Row's and SweepRow's)."""

import datetime
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlib import metrics
from ftlib.errors import FtError, Unreadable
from ftlib.report.cost import stage_costs, time_of
from ftlib.rundir import STAGES, RunDir, reading
from ftlib.runs.decide import Action, QueueAnew
from ftlib.runs.events import Resumed, Settled, Started
from ftlib.runs.ledger import RECOVERY, Ledger
from ftlib.runs.scheduler import AT_WORK, WAITING
from ftlib.slurm.queue import Answer, why_waits
from ftlib.state import ACTIVE, Place, StageState, overall

# The state of a run, or a sweep, of which a file is damaged or may not be read.
UNREADABLE = "unreadable"
COLOURS = {
    "completed": "green", "running": "cyan", "queued": "yellow", "failed": "red", "cancelled": "magenta",
    UNREADABLE: "red",
}  # fmt: skip
# Clocks of a cluster's machines may differ by this much.
CLOCKS_S = 300
# A training that has made no step for so long, and for so many steps' time, is worth a look.
SILENT_S, SILENT_STEPS = 600, 20


@dataclass
class Seen:
    """All that was read about one run."""

    run: RunDir
    known: Ledger
    place: Place
    notes: list[str]  # what a person should know: moved, copied, another's
    stages: dict[str, StageState] = field(default_factory=dict)
    answer: Answer = field(default_factory=lambda: Answer({}))  # what Slurm said of the jobs of all runs of its cluster
    action: Action | None = None  # what is due about it now; None without Slurm

    @property
    def will_recover(self) -> bool:
        """Whether its recovery job is queued or running, and will continue the run."""
        job = self.answer.view().job(self.known.jobs.get(RECOVERY, ""))
        return isinstance(self.action, QueueAnew) and job.state in (*WAITING, *AT_WORK)
    unreadable: str = ""  # which file of its folder is damaged, and what to do; then nothing else is known


@dataclass
class Spent:
    """GPU-hours over all lives: held, of work that was lost, and in which the GPU did nothing (the two may overlap)."""

    gpu_hours: float = 0.0
    lost_gpu_hours: float = 0.0
    idle_gpu_hours: float = 0.0


@dataclass
class Row(Spent):
    """One run, now. None: unknown, or nothing yet."""

    run: str = ""
    state: str = ""
    stage: str | None = None  # the one that works, waits or went wrong; None when all are completed
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None  # seconds of work left in all stages, without queueing
    lives: int = 0  # over all stages
    causes: dict[str, int] = field(default_factory=dict)  # why lives ended before their work was done
    words: str = ""  # why it waits, or how it ended
    notes: list[str] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # state, job_id, lives, words of each


@dataclass
class SweepRow(Spent):
    """One sweep, now: how many of its runs are in each state, and the words that most of those that wait share."""

    sweep: str = ""
    state: str = ""
    runs: int = 0
    states: dict[str, int] = field(default_factory=dict)
    lives: int = 0
    words: str = ""


def row(seen: Seen, now: datetime.datetime) -> Row:
    """The row of a run; `now` with a time zone."""
    try:
        if seen.unreadable:
            raise Unreadable(seen.unreadable)
        with reading(seen.run.path):
            return _readable_row(seen, now)
    except Unreadable as error:
        return Row(run=seen.run.name, state=UNREADABLE, words=str(error), notes=seen.notes)


def _readable_row(seen: Seen, now: datetime.datetime) -> Row:
    known, stages, run = seen.known, seen.stages, seen.run
    stage, words = _now(seen, now)
    state = overall(stages)
    found = Row(
        run=run.name, state=state, stage=stage, lives=_attempts(known), causes=causes(known),
        notes=[*seen.notes, *_clock(known, now)], words=words,
        stages={name: vars(one) for name, one in stages.items()}, **vars(spent(seen, now)))
    try:
        plan = run.plan()
        run.check_spec()
        # An estimate of the plan's until the data is packed.
        packed = run.prepared_file.exists()
        steps = run.spec().train.total_steps(run.prepared()["train"]["rows"]) if packed else plan["steps"]
    except Unreadable:
        raise
    except FtError as error:
        found.notes += error.messages
        return found
    found.steps, rows = steps, metrics.last_steps(run.metrics_file) if known.attempts.get("train") else []
    resumed = known.of(Resumed, "train")
    if resumed and (not rows or resumed[-1].attempt > rows[-1]["life"]):
        found.step = resumed[-1].step
    elif rows:
        found.step, found.loss = rows[-1]["step"], rows[-1]["loss"]
    pace_s = _pace_s(rows)
    if stage == "train" and state == "running" and rows and pace_s:
        found.tokens_per_s = statistics.median(one["tokens_per_s"] for one in rows)
        silent_s = (now - time_of(rows[-1])).total_seconds()
        if rows[-1]["life"] == known.attempt_count("train") and silent_s > max(SILENT_S, SILENT_STEPS * pace_s):
            found.words = f"no step for {silent_s / 60:.0f} min: make logs RUN={run.name}"
    if state in ACTIVE:
        ahead = 1 - (found.step or 0) / steps if steps else 1.0
        found.left_s = _left_s(seen, plan, now, ahead=ahead, training_s=(steps or 0) * pace_s)
    return found


def sweep_row(name: str, members: Sequence[Seen], now: datetime.datetime) -> SweepRow:
    """The row of a sweep's runs."""
    total, states, words = Spent(), Counter[str](), Counter[str]()
    for seen in members:
        try:
            with reading(seen.run.path):
                of_run = spent(seen, now)
            if seen.unreadable:
                raise Unreadable(seen.unreadable)
        except Unreadable as error:
            states[UNREADABLE] += 1
            words[str(error)] += 1
            continue
        states[overall(seen.stages)] += 1
        for key, value in vars(of_run).items():
            setattr(total, key, getattr(total, key) + value)
        stage, said = _now(seen, now)
        if stage and seen.stages[stage].state in ("queued", "failed"):
            words[said] += 1
    order = ("running", "queued", UNREADABLE, "failed", "cancelled", "completed")
    return SweepRow(
        sweep=name, state=next((state for state in order if states[state]), "queued"), runs=len(members),
        states={state: states[state] for state in order if states[state]},
        lives=sum(_attempts(seen.known) for seen in members),
        words="; ".join(f"{count} × {text}" for text, count in words.most_common(2) if text), **vars(total),
    )  # fmt: skip


def spent(seen: Seen, now: datetime.datetime) -> Spent:
    """What a run's GPUs were used for; nothing where none computes."""
    try:
        plan = seen.run.plan() if _attempts(seen.known) else {}
    except FtError:
        plan = {}
    stages = plan.get("stages", {}).values()
    if not any(stage.get("device", plan.get("device")) == "cuda" for stage in stages):
        return Spent()
    at_work = [name for name, stage in seen.stages.items() if stage.state == "running"]
    costs = stage_costs(seen.known, plan, now.timestamp(), at_work)
    held, lost = sum(cost.gpu_hours for cost in costs), sum(cost.lost_gpu_hours for cost in costs)
    return Spent(held, lost, metrics.idle_gpu_hours(seen.run.path))


def causes(known: Ledger) -> dict[str, int]:
    """Why lives ended before their work was done, and how many did."""
    of_life: dict[tuple[str, int], str] = {}
    for settled in known.of(Settled):
        of_life.setdefault((settled.stage, settled.attempt), settled.cause)
    return dict(Counter(of_life.values()).most_common())


def _attempts(known: Ledger) -> int:
    """Attempts of all stages."""
    return sum(known.attempt_count(stage) for stage in STAGES)


def _now(seen: Seen, now: datetime.datetime) -> tuple[str | None, str]:
    """The first stage that is not completed (None: all are), and why it waits or how it ended."""
    name = next((name for name in STAGES if seen.stages[name].state != "completed"), None)
    if name is None:
        return None, ""
    stage = seen.stages[name]
    if stage.state == "queued":
        job = seen.answer.jobs.get(stage.job_id or "")
        return name, why_waits(job, now.timestamp()) if job else ""
    return name, f"{name}: {stage.words}" if stage.words and stage.state != "running" else ""


def _clock(known: Ledger, now: datetime.datetime) -> list[str]:
    last = max(known.events, key=lambda event: event.time, default=None)
    if last is None or last.time - now.timestamp() < CLOCKS_S:
        return []
    of = getattr(last, "node", "") or last.writer
    at = datetime.datetime.fromtimestamp(last.time, datetime.timezone.utc).isoformat()
    return [f"an event of {at[:16]} UTC is yet to come: a clock is wrong, here or of {of}"]


def _pace_s(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds a step, saves and validations included; 0 where that cannot be told."""
    if len(rows) < 2:
        return 0.0
    wall = (time_of(rows[-1]) - time_of(rows[0])).total_seconds() / (len(rows) - 1)
    return wall if wall > 0 else statistics.median(row["seconds"] for row in rows)


def _left_s(seen: Seen, plan: dict[str, Any], now: datetime.datetime, *, ahead: float,
            training_s: float) -> float | None:
    """What is left of all stages, in seconds; None where a stage's time is not known.
    ahead: share of the training that is to be done. training_s: all of it at the measured pace; 0 where none is."""
    total = 0.0
    for name, stage in seen.stages.items():
        minutes = plan["stages"][name]["estimate_min"]
        if stage.state == "completed":
            continue
        if name == "train" and (training_s or minutes is not None):
            total += ahead * (training_s or 60 * minutes)
        elif minutes is None:
            return None
        else:
            starts = seen.known.of(Started, name)
            ran_s = now.timestamp() - starts[-1].time if starts and stage.state == "running" else 0.0
            total += max(0.0, 60 * minutes - max(0.0, ran_s))
    return total
