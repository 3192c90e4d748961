"""RunDir: one folder per run, where every hand-over between stages is a file."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ftlib import atomic
from ftlib.claim import claim
from ftlib.errors import InputError, Unreadable, nearest
from ftlib.plan import numerics
from ftlib.plan.numerics import Numerics
from ftlib.runs import outcome
from ftlib.runs.folder import RunFolder
from ftlib.runs.ledger import STAGES as STAGES
from ftlib.runs.ledger import Ledger
from ftlib.spec import RunSpec, file_digest, read

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _inside(name: str) -> cached_property[Path]:
    return cached_property(lambda run: run.path / name)


class RunDir(RunFolder):
    """Paths of a run, and the few files every stage reads. Making one touches nothing."""

    spec_file = _inside("spec.json")
    plan_file = _inside("plan.json")
    provenance_file = _inside("provenance.json")
    code = _inside("code")
    slurm = _inside("slurm")
    events = _inside("events")
    outcomes = _inside("outcomes")
    lives = _inside("lives")
    prepared_file = _inside("prepared.json")
    checkpoints = _inside("checkpoints")
    metrics_file = _inside("metrics.jsonl")
    export = _inside("export")
    evaluation_file = _inside("evaluation.json")
    report_file = _inside("report.md")
    siblings_file = _inside("siblings")

    def spec(self) -> RunSpec:
        """The run's frozen settings. Once prepare has found which commit a hub model's revision stands for, that commit
        is model.revision: a branch that moves between two stages changes nothing."""
        spec = self.requested()
        commit = self.prepared().get("model_commit") if self.prepared_file.exists() else None
        if commit is None:
            return spec
        return spec.model_copy(update={"model": spec.model.model_copy(update={"revision": commit})})

    def gone(self) -> str:
        """Empty while the folder in which an attempt began is there; else what to tell who moved or deleted it.

        A file server that does not answer has not deleted it.
        """
        try:
            os.stat(self.lives)
        except (FileNotFoundError, NotADirectoryError):
            again = f"If it was moved, make resume RUN={self.name} continues it where it is now"
            return f"{self.path} is not there any more: it was moved or deleted. Nothing more is saved. {again}"
        except OSError:
            pass
        return ""

    def check_spec(self) -> None:
        """Unreadable where spec.json is damaged; one of another version is not."""
        self._json(self.spec_file)

    def requested(self) -> RunSpec:
        """The settings as they were submitted."""
        return read(RunSpec, self.spec_file)

    def plan(self) -> dict[str, Any]:
        """The plan that was shown when the run was made, as plain data: a record with estimates for reports. What a job
        is submitted with is computed for every submission."""
        return self._json(self.plan_file)

    def numerics(self, known: Ledger | None = None) -> Numerics:
        """What decides the run's bits, its overrides included; `known`: its ledger, where it was read already.

        InputError where the file is missing or damaged.
        """
        return numerics.stored(self.path).overridden((known or self.ledger()).overrides(now=time.time()))

    def stage_plan(self, stage: str) -> dict[str, Any]:
        """What the last job of a stage was submitted with (StagePlan as plain data), for the job itself to check; the
        plan that was shown, where no submission has recorded it. Never read for the next submission."""
        file = self.slurm / stage / "request.json"
        if file.exists():
            return dict(self._json(file)["stage"])
        return dict(self.plan()["stages"][stage])

    def ledger(self) -> Ledger:
        """All that is recorded now. Raises Unreadable, which names the damaged file."""
        with reading(self.path):
            return super().ledger()

    def provenance(self) -> dict[str, Any]:
        """Cluster, code, lock, and what data the run was submitted with."""
        return self._json(self.provenance_file)

    def prepared(self) -> dict[str, Any]:
        """What the prepare stage found and made."""
        return self._json(self.prepared_file)

    def _json(self, path: Path) -> dict[str, Any]:
        with reading(path):
            with open(path, encoding="utf-8") as file:
                value = json.load(file)
            if not isinstance(value, dict):
                raise ValueError("it holds no JSON object")
        return value

    def stage_done(self, stage: str) -> bool:
        """Whether a life of the stage has ended well."""
        return outcome.done(self.outcomes, stage)

    def claim(self, *, wait_s: float = 0.0, silent_s: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Be the only process on a login node or laptop that queues or runs stages of this run; see ftlib.claim."""
        return claim(self.path, f"run {self.name}", wait_s=wait_s, silent_s=silent_s)

    def siblings(self) -> "list[RunDir]":
        """Runs of the same sweep that get this one's dataset."""
        names = self.siblings_file.read_text(encoding="utf-8").split() if self.siblings_file.exists() else []
        return [RunDir(self.path.parent / name) for name in names]


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what a damaged file makes of its readers into Unreadable. `file`: the one that is read, or their folder."""
    mend = "Repair it, restore it from a backup, or move the run's folder away; other runs are not touched by it"
    try:
        yield
    except OSError as error:
        what = f"{error.filename or file}: cannot be read ({error.strerror or error})"
        if isinstance(error, FileNotFoundError):
            what += ". Was the stage that writes it completed, or the run's folder moved or deleted?"
        raise Unreadable(f"{what} {mend}" if what.endswith("?") else f"{what}. {mend}") from None
    except KeyError as error:
        raise Unreadable(f"{file}: is damaged (it lacks {error}). {mend}") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise Unreadable(f"{file}: is damaged ({error}). {mend}") from None


def code_digest(code: dict[str, Path]) -> str:
    """A digest of the content of `code` folders, in hex; a snapshot has the same as what it was made of."""
    digest = hashlib.sha256()
    for place, source in sorted(code.items()):
        for file in sorted(path for path in source.rglob("*") if path.is_file() and _belongs(path.relative_to(source))):
            digest.update(f"{place}/{file.relative_to(source)} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _belongs(file: Path) -> bool:
    """Whether a snapshot holds the file (see `_copy`)."""
    return not any(part == "__pycache__" or part.startswith(".") for part in file.parts) and file.suffix != ".pyc"


def snapshot(runs: Path, code: dict[str, Path]) -> Path:
    """A copy of the `code` folders that many runs share: runs/.code/<digest>, made where it is not there yet."""
    target = runs / ".code" / code_digest(code)[:16]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = atomic.temporary_beside(target)
        _copy(code, temporary)
        atomic.commit_folder(temporary, target)
    return target


def _copy(code: dict[str, Path], target: Path) -> None:
    for place, source in code.items():
        shutil.copytree(source, target / place, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


def create(runs: Path, name: str, files: dict[str, Any], code: dict[str, Path] | Path) -> RunDir:
    """A new run folder with JSON `files` and a snapshot of the `code` folders: there whole, or not at all.
    `code` may be a `snapshot` that is there already; the run then links to it. When the folder is there already, that
    one is the run."""
    runs.mkdir(parents=True, exist_ok=True)
    target = runs / name
    if target.exists():
        return RunDir(target)
    temporary = atomic.temporary_beside(target)
    run = RunDir(temporary)
    try:
        for folder in (run.slurm, run.events, run.outcomes, run.lives, run.checkpoints):
            folder.mkdir(parents=True)
        for file, value in files.items():
            (temporary / file).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if isinstance(code, Path):
            run.code.symlink_to(os.path.relpath(code, target))
        else:
            _copy(code, run.code)
        atomic.commit_folder(temporary, target)
    except OSError as error:
        raise InputError(f"{target}: the run folder cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return RunDir(target)


def find(runs: Path, name: str) -> RunDir:
    """The run called `name` in `runs`; InputError when there is none or the name leaves the folder."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"RUN: {name!r} is no name of a run: letters, digits, '.', '_' and '-' only, as 'make status' prints them")
    run = RunDir(runs / name)
    if _made_at(run.path) is None:
        known = [run.name for run in every(runs)]
        listed = f" Runs here: {', '.join(known[-10:])}." if known else f" There are no runs in {runs} yet."
        raise InputError(f"RUN: there is no run {name!r}.{listed}{nearest(name, known)}")
    return run


def every(runs: Path) -> list[RunDir]:
    """All runs, oldest first."""
    found = []
    for name in os.listdir(runs) if runs.is_dir() else ():
        if NAME.fullmatch(name) and (made_at := _made_at(f"{runs}/{name}")) is not None:
            found.append((made_at, name))
    return [RunDir(runs / name) for _, name in sorted(found)]


def is_run(path: Path) -> bool:
    """Whether the folder is a run's, damaged or not."""
    return _made_at(path) is not None


def _made_at(path: Path | str) -> float | None:
    """When the run was made, in seconds since 1970; None where the folder is no run's.

    One that may not be looked into, or has lost its spec.json, is a run all the same: it shall not vanish in silence.
    """
    try:
        return os.stat(f"{path}/spec.json").st_mtime
    except (FileNotFoundError, NotADirectoryError):
        file = f"{path}/provenance.json"
    except OSError:
        file = str(path)
    try:
        return os.stat(file).st_mtime
    except OSError:
        return None
