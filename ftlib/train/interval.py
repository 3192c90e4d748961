"""How often to save: Young's interval from what a save costs and how often lives end without a warning. No torch."""

import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

from ftlib.metrics import read_metrics
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved

# Before the first save nobody knows what one costs: it comes early.
FIRST_STEPS, FIRST_S = 20, 60.0
LAST_FEW = 3


def mean_between_kills_h(prior_h: float, hours: float, kills: int) -> float:
    """Expected hours from one unannounced end to the next: the site's prior counts as one seen after `prior_h`."""
    return (prior_h + hours) / (kills + 1)


def interval_s(save_s: float, between_kills_h: float) -> float:
    """Seconds of work between two saves that lose least: √(2 δ M), of δ seconds a save and mean time M between kills.
    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974) 530."""
    return math.sqrt(2 * save_s * between_kills_h * 3600)


@dataclass(frozen=True)
class History:
    """What earlier lives of a training tell."""

    hours: float = 0.0
    kills: int = 0  # lives that ended without an outcome: nobody was warned
    barren: int = 0  # how many of these, the latest in a row, came before the life's first save
    save_s: list[float] = field(default_factory=list)  # what the last few saves took


def history(run: RunDir, life: int) -> History:
    """That of the lives before `life`."""
    began: dict[int, float] = {}
    last: dict[int, float] = {}
    saves: list[tuple[int, float]] = []
    known = run.ledger()
    for event in known.events:
        number = getattr(event, "attempt", None)
        # An epilogue or a later prologue may speak of a life much later.
        if number is None or number >= life or event.writer != f"train-{number}":
            continue
        began.setdefault(number, event.time)
        last[number] = max(event.time, last.get(number, event.time))
        if isinstance(event, CheckpointSaved):
            saves.append((number, event.seconds))
    for row in read_metrics(run.metrics_file):
        if row["life"] in last:
            last[row["life"]] = max(last[row["life"]], _seconds(row["time"]))
    told = {end.attempt for end in known.outcomes.get("train", ())}
    saved = {number for number, _ in saves}
    barren = len(list(takewhile(lambda number: number not in told | saved, sorted(began, reverse=True))))
    hours = sum(last[number] - began[number] for number in began) / 3600
    return History(hours, len(began.keys() - told), barren, [seconds for _, seconds in saves[-LAST_FEW:]])


def _seconds(timestamp: str) -> float:
    return datetime.datetime.fromisoformat(timestamp).timestamp()


class Cadence:
    """Says when a periodic save is due in this life. Only rank 0 asks; the others follow."""

    def __init__(
        self, every_steps: int | None, prior_h: float, past: History, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """every_steps: the recipe's own interval, where it has one. prior_h: the site's mean time between kills."""
        self._every, self._prior_h, self._past, self._clock = every_steps, prior_h, past, clock
        self._save_s = list(past.save_s)
        self._began = self._since = clock()
        self._steps = 0
        self._told: float | None = None

    @property
    def seconds(self) -> float | None:
        """The present interval; None before a save was measured, or where the recipe says steps."""
        if self._every is not None or not self._save_s:
            return None
        # Kills that come before a life's first save show that the interval is too long, whatever the mean says.
        save_s, _, between_h = self._known()
        return interval_s(save_s, between_h) / 2**self._past.barren

    def due(self, step: int) -> bool:
        """Whether to save after `step`; asked once after each step."""
        self._steps += 1
        if self._every is not None:
            return step % self._every == 0
        waited, interval = self._clock() - self._since, self.seconds
        if interval is None:
            return self._steps >= FIRST_STEPS >> self._past.barren or waited >= FIRST_S / 2**self._past.barren
        return waited >= interval

    def saved(self, seconds: float) -> None:
        """A save has just been committed in so many seconds."""
        self._save_s = [*self._save_s, seconds][-LAST_FEW:]
        self._since, self._steps = self._clock(), 0

    def words(self) -> str | None:
        """The interval and why, when it is new or has changed by a quarter; else None."""
        interval, past = self.seconds, self._past
        if interval is None or (self._told and 0.75 <= interval / self._told <= 1.25):
            return None
        self._told = interval
        save_s, hours, between_h = self._known()
        halved = f", halved {past.barren} times for kills before a first save" if past.barren else ""
        return (
            f"a checkpoint every {interval:,.0f} s: a save takes {save_s:.2f} s, a kill without warning is expected "
            f"every {between_h:.3g} h ({past.kills} in {hours:.1f} h so far){halved}")

    def _known(self) -> tuple[float, float, float]:
        """Seconds a save takes; hours run; hours between kills."""
        save_s, hours = sum(self._save_s) / len(self._save_s), self._past.hours + (self._clock() - self._began) / 3600
        return max(1e-3, save_s), hours, mean_between_kills_h(self._prior_h, hours, self._past.kills)
