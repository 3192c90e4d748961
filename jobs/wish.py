"""From the command line's words to everything known before a job is queued: spec, profile, plan, the run's name."""

from __future__ import annotations

import argparse
import contextlib
import functools
import getpass
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ftlib import modelfiles, naming, profile, recipe, sweep
from ftlib.errors import InputError, unknown
from ftlib.plan import fits, numerics, plan, shapes
from ftlib.profile import ClusterProfile
from ftlib.slurm import client, container
from ftlib.spec import RunSpec, file_digest

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES = CHECKOUT / "jobs" / "recipes"
CLUSTERS = CHECKOUT / "slurm_templates" / "clusters"
OWN_CLUSTER = CHECKOUT / "cluster.yaml"
RUNS = CHECKOUT / "runs"
SWEEPS = CHECKOUT / "jobs" / "sweeps"
SNAPSHOT = {name: CHECKOUT / name for name in ("ftlib", "jobs", "slurm_templates")}

T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """All that follows from MODEL, DATA, CLUSTER and SET."""

    spec: RunSpec
    profile: ClusterProfile
    plan: plan.RunPlan
    model: modelfiles.ModelFiles
    data_path: Path | None
    data_digest: str
    cache: Path
    init_adapter: Path | None
    planned_from: dict[str, Any]  # what the plan knows of model and data: the model's config, sizes in bytes
    words: dict[str, str]  # the options as they were said

    @property
    def request(self) -> naming.Request:
        """What tells its run from others."""
        return naming.Request(spec=self.spec, data_digest=self.data_digest, cluster=self.profile.name)

    @property
    def name(self) -> str:
        """The run's name, without the suffix that it has where that folder holds another run."""
        return self.request.name

    @property
    def dataset(self) -> str:
        """Sixteen hex digits from all that decides the dataset, as far as it is known before the tokenizer is read."""
        spec = self.spec
        # Without fields that have their defaults: one that a later version adds changes nothing.
        data = spec.data.model_dump(mode="json", exclude_defaults=True)
        parts: list[Any] = [data, spec.tokens.add, spec.model.revision]
        parts += [spec.evaluate.pairs, spec.method.prompted, self.data_digest]
        parts += [str(self.data_path), self.model.path, str(self.cache)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_profile(cluster: str | None, changes: dict[str, Any]) -> ClusterProfile:
    """The profile of `cluster`, or of the one that is meant here, measured where it is this machine itself."""
    found = profile.load(CLUSTERS, cluster or _cluster_here(), changes, OWN_CLUSTER)
    return found if found.scheduler else profile.measured_here(found)


def _cluster_here() -> str:
    """cluster.yaml's, else the one that scontrol reports, else local where there is no Slurm."""
    if own := profile.own_choice(OWN_CLUSTER):
        return own
    if (reported := client.cluster_name()) is None:
        return "local"
    for name in recipe.names(CLUSTERS):
        if (recipe.read_yaml(CLUSTERS / f"{name}.yaml").get("scheduler") or {}).get("cluster_name") == reported:
            return name
    raise InputError(
        unknown("CLUSTER", reported, recipe.names(CLUSTERS))
        + f" This machine's Slurm calls itself {reported!r} and no profile is for it: name one with CLUSTER=, or write "
        f"{CLUSTERS.relative_to(CHECKOUT)}/{reported}.yaml after another's example"
    )


def asked(options: argparse.Namespace) -> Wish:
    """The wish of a command line."""
    return make(model=options.model, data=options.data, cluster=options.cluster, settings=options.set)


def make(*, model: str, data: str | None, cluster: str | None, settings: str) -> Wish:
    """Resolve everything; InputError lists every problem that can be seen at once."""
    return make_all(model=model, data=data, cluster=cluster, settings=settings, points=[{}])[0]


def make_all(
    *, model: str, data: str | None, cluster: str | None, settings: str, points: Sequence[dict[str, Any]],
    adapters_only: bool = False,
) -> list[Wish]:  # fmt: skip
    """The wish of each point (changes to the recipe beyond `settings`); what they share is looked up once.

    adapters_only: points whose method has an adapter export it alone, unless recipe, settings or point say
    export.merged; one that has a run with merged weights already keeps it.
    InputError lists every problem, and how many of several points have it.
    """
    problems: list[str] = []
    changes: dict[str, Any] = {}
    cluster_changes: dict[str, Any] = {}
    site = None
    with _collected(problems):
        changes, cluster_changes = recipe.parse_set(settings)
    with _collected(problems):
        site = load_profile(cluster, cluster_changes)
    path = Path(data).expanduser().resolve() if data else None
    try:
        values = recipe.read(RECIPES, model)
    except InputError as error:
        raise InputError(problems + error.messages) from None
    words = {"MODEL": model, "DATA": str(path or ""), "CLUSTER": site.name if site else "", "SET": settings}
    said = {key: value for key, value in words.items() if value}
    found: list[Wish] = []
    of_points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    once = _Once()
    for point in points:
        try:
            spec = recipe.resolve(values, model, {**changes, **point}, str(path) if path else None)
            if site and not problems:
                unsaid = "merged" not in (recipe.override(values, {**changes, **point}).get("export") or {})
                if adapters_only and unsaid and spec.method.adapts:
                    found.append(_without_merging(spec, site, said, once))
                else:
                    found.append(_wish(spec, site, said, once))
        except InputError as error:
            for message in error.messages:
                of_points[message].append(point)
    for message, having in of_points.items():
        of = f" (in {len(having)} of {len(points)} points, first {sweep.words(having[0])})" if len(points) > 1 else ""
        problems.append(message + of)
    if problems:
        raise InputError(problems)
    return found


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems += error.messages


class _Once:
    """What many points share is looked up for the first alone; an InputError is kept, too."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, call: Callable[[], T]) -> T:
        if key not in self._known:
            try:
                self._known[key] = call()
            except InputError as error:
                self._known[key] = error
        if isinstance(self._known[key], InputError):
            raise self._known[key]
        return cast(T, self._known[key])


def _wish(spec: RunSpec, site: ClusterProfile, said: dict[str, str], once: _Once) -> Wish:
    """One point's wish; InputError with all of its problems."""
    problems: list[str] = []
    cache = site.cache_dir(CHECKOUT)
    path, digest, size = None, "", None
    init_adapter = planned = None
    download = 0
    with _collected(problems):
        # What only chooses among the rows decides nothing here.
        source = spec.data.model_copy(update={"limit": None, "share": None, "pairs": 1, "seq_len": 16})
        path, digest, size = once(source, lambda: _data(spec, cache, internet=site.compute_internet))
    with _collected(problems):
        files, shape = once(spec.model, lambda: _model(spec, site, cache))
        problems += fits.problems(spec, shape)
        if spec.model.init_from:
            init, init_adapter = once(
                ("from", spec.model), lambda: modelfiles.start(spec.model.init_from or "", runs=RUNS, checkout=CHECKOUT)
            )
            start = shapes.from_config(init.config, init.path) if init else None
            problems += fits.start_problems(spec, shape, start, init_adapter)
            files, shape = init or files, start or shape
        # Weights on the Hub are of 16 bits.
        download = 0 if files.at_hand else 2 * shape.params
        planned = plan.make(spec, site, shape, data_bytes=size, download_bytes=download)
    if problems or planned is None:
        raise InputError(problems)
    facts = {"model_config": files.config, "data_bytes": size, "download_bytes": download}
    return Wish(spec, site, planned, files, path, digest, cache, init_adapter, facts, said)


def _without_merging(spec: RunSpec, site: ClusterProfile, said: dict[str, str], once: _Once) -> Wish:
    """The wish without merged weights, or the one of `spec` where that has a run, by hand or of an earlier version."""
    export = spec.export.model_copy(update={"merged": False})
    lean = _wish(spec.model_copy(update={"export": export}), site, said, once)
    merging = replace(lean, spec=spec)
    if naming.choose(RUNS, merging.request).exists:
        return _wish(spec, site, said, once)
    return lean


def _model(spec: RunSpec, site: ClusterProfile, cache: Path) -> tuple[modelfiles.ModelFiles, shapes.ModelShape]:
    name, internet = spec.model.name, site.compute_internet
    files = modelfiles.locate(name, spec.model.revision, checkout=CHECKOUT, cache=cache, internet=internet)
    return files, shapes.from_config(files.config, name)


def _data(spec: RunSpec, cache: Path, *, internet: bool) -> tuple[Path | None, str, int | None]:
    """The data file, its content's digest and size. Without a file None, and a fixed digest: the spec says the rest."""
    from ftlib.data import hub, sources

    if spec.data.hub:
        size = hub.check(spec.data, hf_home=modelfiles.hf_home(cache), internet=internet)
        return None, "hub", size
    if spec.data.path is None:
        return None, "generated", None
    path = Path(spec.data.path).expanduser()
    found = sources.check_file(path if path.is_absolute() else CHECKOUT / path, spec.data)
    return found.path, found.digest, found.bytes


def files_of(wish: Wish, name: str, *, sweep: str | None = None) -> dict[str, Any]:
    """The JSON files a new run folder begins with; `sweep`: the sweep that makes it."""
    provenance = {
        "run": name, "sweep": sweep, "dataset": wish.dataset, "said": wish.words,
        "cluster": wish.profile.name, "profile": wish.profile.model_dump(mode="json"),
        "checkout": str(CHECKOUT), "cache": str(wish.cache), "model_path": wish.model.path,
        "init_adapter": str(wish.init_adapter) if wish.init_adapter else None,
        "data_path": str(wish.data_path) if wish.data_path else None, "data_digest": wish.data_digest,
        "planned_from": wish.planned_from, "python": sys.executable, "python_version": platform.python_version(),
        "user": getpass.getuser(), "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_version(), "image": container.image(wish.profile, CHECKOUT), "locks": locks(),
    }  # fmt: skip
    spec, planned = wish.spec.model_dump(mode="json"), wish.plan.model_dump(mode="json")
    begun = numerics.first(wish.spec, planned, locks()).model_dump(mode="json")
    return {"spec.json": spec, "plan.json": planned, numerics.FILE: begun, "provenance.json": provenance}


@functools.cache
def locks() -> dict[str, str]:
    """Each dependency lock and the digest of its content."""
    return {path.name: file_digest(path)[:16] for path in sorted((CHECKOUT / "env").glob("*.lock"))}


@functools.cache
def code_version() -> dict[str, Any]:
    """Commit of the checkout, and whether files differ from it; nulls outside git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed) if changed is not None else None}
