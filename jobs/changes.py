"""What the owner of a run changes after it was submitted, as overrides: cluster.…, other nodes, other locks.

Nothing is recorded before all of it was checked, the placement that follows from it included.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterable, Sequence
from typing import Any

from ftlib import atomic, profile, recipe
from ftlib.errors import InputError
from ftlib.plan import numerics
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.runs import earlier, overrides
from ftlib.runs.events import Override
from ftlib.spec import divisors
from jobs import placement

# Of a profile, what changes no job.
FOR_PEOPLE = ("description",)


def of_resume(
    run: RunDir, cluster: dict[str, Any], nodes: str, *, busy: Sequence[str], locks: dict[str, str]
) -> list[Override]:
    """What `make resume` asks for, checked.

    Args:
        run: The run.
        cluster: Dotted field of the profile -> value (SET="cluster.…").
        nodes: Nodes of the training (NODES=); empty where they stay.
        busy: Stages with a job, which has its nodes already.
        locks: The checkout's dependency locks and their digests.

    Raises:
        InputError: Names every field that is wrong; or the jobs could not be placed.
    """
    who, why = getpass.getuser(), "make resume"
    if "name" in cluster:
        raise InputError("SET: cluster.name: a run stays on the cluster that it was submitted to")
    profile.changed(placement.owners_profile(run), cluster)
    changes = [Override(field=overrides.CLUSTER + name, value=value, who=who, why=why)
               for name, value in cluster.items()]  # fmt: skip
    micro_batches: list[int] = []
    if nodes:
        changes.append(_nodes(run, nodes, busy, who=who, why=why))
    if nodes or cluster:
        micro_batches = _micro_batches(run, changes)
    changes += _locks(run, locks, who=who, why=f"{why}: the checkout has other locks")
    return _placed(run, changes, micro_batches, who=who, why=why) if changes else []


def of_second_submit(run: RunDir, wanted: ClusterProfile, said: Iterable[str], locks: dict[str, str]) -> list[Override]:
    """What submitting a run's settings again changes: the fields of its profile that are others now than when it was
    first submitted (cluster.yaml, the site's own file), or that the person names.

    wanted: the profile of this submit. said: dotted fields that the person names. locks: as in `of_resume`.
    """
    who, why = getpass.getuser(), "make submit"
    submitted = placement.submitted_profile(run, run.provenance()).model_dump(mode="json")
    current, now = placement.owners_profile(run).model_dump(mode="json"), wanted.model_dump(mode="json")
    named = {field.partition(".")[0] for field in said}
    changes = [
        Override(field=overrides.CLUSTER + name, value=value, who=who, why=why) for name, value in now.items()
        if name not in FOR_PEOPLE and value != current[name] and (value != submitted[name] or name in named)
    ]  # fmt: skip
    micro_batches = _micro_batches(run, changes) if changes else []
    changes += _locks(run, locks, who=who, why=f"{why}: the checkout has other locks")
    return _placed(run, changes, micro_batches, who=who, why=why) if changes else []


def follow(run: RunDir, wanted: ClusterProfile, settings: str, locks: dict[str, str]) -> None:
    """Record what submitting a run's settings again changes, where some of its stages are still to be submitted.

    settings: SET=, in which a person may name fields of the profile. wanted, locks: as in `of_second_submit`.
    """
    _, named = recipe.parse_set(settings)
    same = run.provenance().get("profile") == wanted.model_dump(mode="json")
    if (same and not named and not locks) or run.ledger().first_open is None:
        return
    changes = of_second_submit(run, wanted, named, locks)
    if changes:
        with run.claim():
            record(run, changes)


def record(run: RunDir, changes: Sequence[Override]) -> None:
    """Record checked changes, and say them. Must be called under `run.claim()`."""
    if not changes:
        return
    run.record(*changes)
    for change in changes:
        if change.field.startswith(overrides.VERSIONS):
            name = change.field.removeprefix(overrides.VERSIONS)
            print(f"{run.name}: this checkout's {name} differs from the one that the run began with.")
        else:
            print(f"{run.name}: {change.field} is {_text(change.value)} for what is submitted from now on.")
    if not (run.path / numerics.FILE).exists():
        _tell_the_first_release(run)


def sentence(run: RunDir) -> str:
    """How a training shares out the rows of a step now."""
    now = run.numerics()
    nodes = f"{now.nodes} node{'s' if now.nodes != 1 else ''}"
    return (
        f"{run.name} trains on {nodes}: micro-batch {now.micro_batch} x accumulation {now.accumulation} x "
        f"{now.world_size} GPUs, {now.rows_per_step} rows a step as before")


def _nodes(run: RunDir, nodes: str, busy: Sequence[str], *, who: str, why: str) -> Override:
    if not nodes.isdigit() or nodes == "0":
        raise InputError(f"NODES: {nodes!r} is no number of nodes; allowed: 1 and more")
    if run.stage_done("train"):
        raise InputError(f"NODES: the training of {run.name} is done; there is nothing left to train")
    if busy:
        raise InputError(
            f"NODES: {', '.join(busy)} of {run.name} is queued or running with the nodes it has. "
            f"make cancel RUN={run.name}, and once that has ended make resume RUN={run.name} NODES={nodes}")
    return Override(field=overrides.NODES, value=int(nodes), who=who, why=why)


def _micro_batches(run: RunDir, changes: Sequence[Override]) -> list[int]:
    """The micro-batches that a changed run can train with, the preferred first: the one it has, else smaller ones. What
    has fitted until now is never exceeded."""
    begun = run.numerics()
    nodes = next((change.value for change in changes if change.field == overrides.NODES), begun.nodes)
    world_size, rows = nodes * begun.processes_per_node, begun.rows_per_step
    if rows % world_size:
        raise InputError(
            f"NODES: {rows} rows cannot be shared by {world_size} GPUs; use a number of GPUs among {divisors(rows)}")
    return [size for size in reversed(divisors(rows // world_size)) if size <= begun.micro_batch]


def _locks(run: RunDir, locks: dict[str, str], *, who: str, why: str) -> list[Override]:
    """The locks with which a run is resumed, where they are others than those it has begun with."""
    begun = run.numerics().versions
    return [Override(field=overrides.VERSIONS + name, value=digest, who=who, why=why)
            for name, digest in locks.items() if name in begun and begun[name] != digest]  # fmt: skip


def _placed(
    run: RunDir, changes: list[Override], micro_batches: Sequence[int], *, who: str, why: str
) -> list[Override]:  # fmt: skip
    """`changes`, with the largest of `micro_batches` that a GPU holds. InputError where the jobs cannot be placed."""
    begun, refused = run.numerics().micro_batch, None
    for rows in micro_batches or [begun]:
        smaller = [Override(field=overrides.MICRO_BATCH, value=rows, who=who, why=why)] if rows != begun else []
        try:
            placement.of(run, [*changes, *smaller])
        except InputError as error:
            refused = refused or error
        else:
            return [*changes, *smaller]
    assert refused is not None
    raise refused


def _text(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _tell_the_first_release(run: RunDir) -> None:
    """A run of the first release continues with its own code, which reads no overrides: put them where it looks."""
    known, begun = run.ledger(), run.numerics()
    plan, provenance = run.plan(), run.provenance()
    batch = {"world_size": begun.world_size, "micro_batch": begun.micro_batch, "accumulation": begun.accumulation}
    train = {**plan["stages"]["train"], "nodes": begun.nodes}
    changed = {**plan, **batch, "zero": begun.zero, "stages": {**plan["stages"], "train": train}}
    atomic.write_json(run.plan_file, changed)
    earlier.forget_micro_batch(run.path)
    submitted_under = provenance["profile"]
    cluster = known.overrides(now=0.0).cluster
    if cluster:
        changed_profile = recipe.override(submitted_under, cluster)
        atomic.write_json(run.provenance_file, {**provenance, "profile": changed_profile})
