"""SweepDir: where a sweep is kept, runs/sweeps/<sweep>-<recipe>-<hash>/. Its points are runs like any other."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ftlib import atomic
from ftlib.claim import claim
from ftlib.errors import InputError, nearest
from ftlib.profile import ClusterProfile
from ftlib.rundir import NAME, RunDir, is_run
from ftlib.runs import outcome
from ftlib.spec import Model, read
from ftlib.sweep import Point, SweepSpec

FOLDER = "sweeps"


class Sweep(Model):
    """What sweep.json holds: the file as it was, the words it was asked with, each point, where they run."""

    spec: SweepSpec
    said: dict[str, str]
    points: dict[str, Point]  # run -> swept field -> value
    profile: ClusterProfile
    cache: Path


class SweepDir:
    """Paths of a sweep. Making one touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.file = path / "sweep.json"
        self.events = path / "events"
        self.arrays = path / "arrays"  # a folder per array, in it a link per task: <index> -> its run
        self.code = path / "code"  # a link to the snapshot of the last submit
        self.datasets = path / "datasets"  # a file per dataset: the name of the run that prepares it
        self.csv_file = path / "report.csv"

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.path.parent.parent

    def read(self) -> Sweep:
        """The sweep as it was last submitted; InputError when it cannot be read."""
        return read(Sweep, self.file)

    def write(self, sweep: Sweep) -> None:
        """Commit it; the folder is made."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.write_text(self.file, sweep.model_dump_json(indent=1) + "\n")

    def members(self) -> list[RunDir]:
        """The points' runs that are there, in the sweep's order."""
        return [RunDir(self.runs / name) for name in self.read().points if is_run(self.runs / name)]

    def claim(self, *, wait_s: float = 0.0, silent_s: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Be the only process that queues points of this sweep; see ftlib.claim."""
        return claim(self.path, f"sweep {self.name}", wait_s=wait_s, silent_s=silent_s)


def every(runs: Path) -> list[SweepDir]:
    """All sweeps, oldest first."""
    found = [path for path in (runs / FOLDER).glob("*") if NAME.fullmatch(path.name)]
    made_at = {path: at for path in found if (at := _made_at(path)) is not None}
    return [SweepDir(path) for path in sorted(made_at, key=lambda path: made_at[path])]


def _made_at(path: Path) -> float | None:
    """When the sweep was last submitted, in seconds since 1970; None where the folder is no sweep's. One that may not
    be looked into is a sweep all the same."""
    try:
        return os.stat(path / "sweep.json").st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return 0.0


def _was_asked(sweep: SweepDir, said: str) -> bool:
    """Whether the sweep was made of that sweep file; not of any where it cannot be read."""
    try:
        return sweep.read().said.get("SWEEP") == said
    except InputError:
        return False


def find(runs: Path, said: str) -> SweepDir:
    """The sweep of that name, or the only one of that sweep file; InputError lists what there is."""
    known = {sweep.name: sweep for sweep in every(runs)}
    of_file = [name for name, sweep in known.items() if _was_asked(sweep, said)]
    if said in known or len(of_file) == 1:
        return known[said if said in known else of_file[0]]
    if of_file:
        raise InputError(f"SWEEP: {said!r} was submitted in {len(of_file)} ways; say which: {', '.join(of_file)}")
    listed = f" Sweeps here: {', '.join(list(known)[-10:])}." if known else f" There are no sweeps in {runs} yet."
    raise InputError(f"SWEEP: there is no sweep {said!r}.{listed}{nearest(said, known)}")


def share_prepared(run: RunDir, siblings: Iterable[RunDir]) -> None:
    """Give the dataset that `run` has prepared to its siblings, whose own prepare stage is done by that."""
    text = run.prepared_file.read_text(encoding="utf-8")
    for sibling in siblings:
        if sibling.path.exists() and not sibling.stage_done("prepare"):
            atomic.write_text(sibling.prepared_file, text)
            # Attempt 0: none of its own.
            outcome.write(sibling.outcomes, outcome.Outcome("prepare", 0, 0, f"prepared by {run.name}"))
