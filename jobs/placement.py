"""Where the jobs of a run go: computed for every submission, by the run's own snapshot of the code.

    profile that the run was submitted under ─┐
    what its owner changed (cluster.…)        ├─► profile ─┐
    nodes to keep away from                  ─┘            ├─► ftlib.plan.plan.make ─► Placement
    spec, numerics, overrides, model, data ────────────────┘

A plan that was made for an earlier submission is no part of it.

    python -m jobs.placement < questions > answers      how a snapshot of other code is asked
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import modelfiles, profile, rundir
from ftlib.errors import InputError
from ftlib.plan import plan, shapes
from ftlib.plan.plan import RunPlan
from ftlib.plan.shapes import ModelShape
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.runs import events
from ftlib.runs.events import CheckpointSaved, Override
from ftlib.runs.ledger import Ledger
from ftlib.runs.overrides import Overrides

# This code: the checkout, or the snapshot of a run or a sweep.
CODE = Path(__file__).resolve().parent.parent
FOLDERS = ("ftlib", "jobs")
MODULE = "jobs.placement"
# Planning ten thousand runs takes some 20 s.
ANSWER_S = 300


@dataclass(frozen=True)
class Placement:
    """What one submission of a run needs to know."""

    profile: ClusterProfile  # with its owner's changes; `exclude` holds the owner's nodes and all that were bad lately
    plan: RunPlan
    owner_exclude: str | None = None  # the owner's part of `exclude`, as it was written
    excluded: tuple[str, ...] = ()  # the nodes that were bad lately

    @classmethod
    def first(cls, site: ClusterProfile, planned: RunPlan) -> Placement:
        """That of a run which is not there yet, under the profile `site`."""
        return cls(site, planned, owner_exclude=site.exclude)


def of(run: RunDir, changes: Sequence[Override] = (), known: Ledger | None = None) -> Placement:
    """The placement of a run's jobs now. InputError where they cannot be placed.

    changes: overrides that are not recorded yet. known: the run's ledger, where it was read already.
    """
    found = of_all([run], {run.path: changes}, {run.path: known} if known else {})[run.path]
    if isinstance(found, InputError):
        raise found
    return found


class Placer:
    """The placement of one run's jobs, computed anew once its overrides have changed: a decision may record some
    between two submissions."""

    def __init__(self, run: RunDir) -> None:
        self._run: RunDir = run
        self._overrides: Overrides | None = None
        self._placement: Placement | None = None

    def now(self) -> Placement:
        """The placement at this moment. InputError where the jobs cannot be placed."""
        known = self._run.ledger()
        overrides = known.overrides(time.time())
        if self._placement is None or overrides != self._overrides:
            self._placement = of(self._run, known=known)
            self._overrides = overrides
        return self._placement


def of_all(
    runs: Sequence[RunDir], changes: Mapping[Path, Sequence[Override]] | None = None,
    ledgers: Mapping[Path, Ledger] | None = None,
) -> dict[Path, Placement | InputError]:  # fmt: skip
    """`of` for many runs, by their paths; each snapshot of other code is asked once for all of its runs."""
    changes, ledgers, now = changes or {}, ledgers or {}, time.time()
    found: dict[Path, Placement | InputError] = {}
    by_code: dict[Path, list[RunDir]] = {}
    for run in runs:
        code = run.code.resolve()
        if _is_other_code(code):
            by_code.setdefault(code, []).append(run)
            continue
        try:
            known = ledgers.get(run.path) or run.ledger()
            found[run.path] = derive(run, known.with_events(*changes.get(run.path, ())), now)
        except InputError as error:
            found[run.path] = error
    for code, members in by_code.items():
        found |= _ask(code, members, changes)
    return found


def derive(run: RunDir, known: Ledger, now: float) -> Placement:
    """The placement of a run's jobs at `now` (seconds since 1970), by this code."""
    spec, provenance, overrides = run.requested(), run.provenance(), known.overrides(now)
    site = profile.changed(submitted_profile(run, provenance), overrides.cluster)
    facts = provenance.get("planned_from") or _facts_of_an_earlier_run(provenance, spec.model.revision)
    made = plan.make(
        spec, site, _shape(json.dumps(facts["model_config"]), spec.model.name), data_bytes=facts["data_bytes"],
        download_bytes=facts["download_bytes"], numerics=run.numerics(known), overrides=overrides,
        longest_save_s=max((save.seconds for save in known.of(CheckpointSaved)), default=0.0),
    )  # fmt: skip
    with_all = site.model_copy(update={"exclude": overrides.exclude_list(site.exclude)})
    return Placement(with_all, made, owner_exclude=site.exclude, excluded=overrides.excluded)


@functools.lru_cache(64)
def _shape(config: str, name: str) -> ModelShape:
    """The shape that a model's configuration (JSON) describes: the points of a sweep share one."""
    return shapes.from_config(json.loads(config), name)


def submitted_profile(run: RunDir, provenance: Mapping[str, Any]) -> ClusterProfile:
    """The profile a run was submitted under, without its owner's later changes. A field that an earlier version had is
    left out, so that its runs can be resumed."""
    try:
        return _parsed(json.dumps(provenance["profile"]))
    except (KeyError, ValueError) as error:
        problem = "; ".join(str(error).splitlines()[1:3]) or repr(error)
        raise InputError(f"{run.provenance_file}: its profile cannot be read ({problem})") from None


@functools.lru_cache(64)
def _parsed(stored: str) -> ClusterProfile:
    """A profile as it is stored (JSON)."""
    return ClusterProfile.model_validate_json(stored, extra="ignore")


def owners_profile(run: RunDir, known: Ledger | None = None) -> ClusterProfile:
    """The profile of a run now: as it was submitted, with its owner's changes."""
    overrides = (known or run.ledger()).overrides(time.time())
    return profile.changed(submitted_profile(run, run.provenance()), overrides.cluster)


def _facts_of_an_earlier_run(provenance: Mapping[str, Any], revision: str | None) -> dict[str, Any]:
    """What a plan must know of model and data, for a run whose version did not store it."""
    checkout, cache = Path(provenance["checkout"]), Path(provenance["cache"])
    files = modelfiles.locate(provenance["model_path"], revision, checkout=checkout, cache=cache, internet=True)
    data = Path(provenance["data_path"]) if provenance.get("data_path") else None
    size = data.stat().st_size if data and data.exists() else None
    return {"model_config": files.config, "data_bytes": size, "download_bytes": 0}


# -- a snapshot of other code ------------------------------------------------------------------------------------------


def _is_other_code(code: Path) -> bool:
    """Whether a run's snapshot differs from this code, and can plan. Those of the first release cannot."""
    if code == CODE or not (code / "jobs" / "placement.py").exists():
        return False
    return _digest(code) != _digest(CODE)


@functools.cache
def _digest(code: Path) -> str:
    return rundir.code_digest({name: code / name for name in FOLDERS})


def _ask(
    code: Path, runs: Sequence[RunDir], changes: Mapping[Path, Sequence[Override]]
) -> dict[Path, Placement | InputError]:  # fmt: skip
    """What the snapshot in `code` answers for its runs."""
    now = events.now()
    questions = [
        {"run": str(run.path), "changes": [events.to_row(change, now) for change in changes.get(run.path, ())]}
        for run in runs
    ]
    command = [sys.executable, "-m", MODULE]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=code, env=environment, input=json.dumps(questions), capture_output=True, text=True,
            timeout=ANSWER_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
        answers = [_answer(answer) for answer in json.loads(done.stdout)]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        problem = str(error).splitlines()[0]
        failed = InputError(f"{code}: the run's own code could not plan its jobs: {problem}")
        return {run.path: failed for run in runs}
    return {run.path: answer for run, answer in zip(runs, answers, strict=True)}


def _answer(answer: Mapping[str, Any]) -> Placement | InputError:
    if "problems" in answer:
        return InputError(list(answer["problems"]))
    return Placement(
        _parsed(json.dumps(answer["profile"])), RunPlan.model_validate_json(json.dumps(answer["plan"]), extra="ignore"),
        owner_exclude=answer["owner_exclude"], excluded=tuple(answer["excluded"]),
    )  # fmt: skip


def main() -> None:
    """Answer the questions on standard input: one object for each run, in their order."""
    answers: list[dict[str, Any]] = []
    for question in json.loads(sys.stdin.read()):
        run, now = RunDir(Path(question["run"])), time.time()
        rows = [events.from_row(row, time=now, writer="") for row in question["changes"]]
        try:
            placement = derive(run, run.ledger().with_events(*filter(None, rows)), now)
            answers.append({
                "profile": placement.profile.model_dump(mode="json"), "plan": placement.plan.model_dump(mode="json"),
                "owner_exclude": placement.owner_exclude, "excluded": placement.excluded,
            })  # fmt: skip
        except InputError as error:
            answers.append({"problems": error.messages})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
