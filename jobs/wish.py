"""From the command line's words to everything known before a job is queued: spec, profile, plan, the run's name."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import modelfiles, profile, recipe, rundir
from ftlib.errors import InputError, unknown
from ftlib.plan import fits, plan, shapes
from ftlib.profile import ClusterProfile
from ftlib.slurm import client
from ftlib.spec import RunSpec, file_digest

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES = CHECKOUT / "jobs" / "recipes"
CLUSTERS = CHECKOUT / "slurm_templates" / "clusters"
OWN_CLUSTER = CHECKOUT / "cluster.yaml"
RUNS = CHECKOUT / "runs"
SNAPSHOT = {name: CHECKOUT / name for name in ("ftlib", "jobs", "slurm_templates")}


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
    words: dict[str, str]  # the options as they were said

    @property
    def name(self) -> str:
        """The run's name; the same wish has the same."""
        return f"{self.spec.recipe}-{self.spec.run_hash(data_digest=self.data_digest, cluster=self.profile.name)}"


def choose_cluster(said: str | None) -> str:
    """The cluster said, else cluster.yaml's, else the one that scontrol reports, else local where there is no Slurm."""
    if said:
        return said
    if own := profile.own_choice(OWN_CLUSTER):
        return own
    reported = client.cluster_name()
    if reported is None:
        return "local"
    for name in recipe.names(CLUSTERS):
        values = recipe.read_yaml(CLUSTERS / f"{name}.yaml")
        if (values.get("scheduler") or {}).get("cluster_name") == reported:
            return name
    raise InputError(
        unknown("CLUSTER", reported, recipe.names(CLUSTERS))
        + f" This machine's Slurm calls itself {reported!r} and no profile is for it: name one with CLUSTER=, or write "
        f"{CLUSTERS.relative_to(CHECKOUT)}/{reported}.yaml after another's example"
    )


def load_profile(cluster: str, changes: dict[str, Any]) -> ClusterProfile:
    """The profile of `cluster`, measured where it is this machine itself."""
    found = profile.load(CLUSTERS, cluster, changes, OWN_CLUSTER)
    return found if found.scheduler else profile.measured_here(found)


def make(*, model: str, data: str | None, cluster: str | None, settings: str) -> Wish:
    """Resolve everything; InputError lists every problem that can be seen at once."""
    problems: list[str] = []
    changes: dict[str, Any] = {}
    cluster_changes: dict[str, Any] = {}
    spec = site = None
    try:
        changes, cluster_changes = recipe.parse_set(settings)
    except InputError as error:
        problems += error.messages
    try:
        site = load_profile(choose_cluster(cluster), cluster_changes)
    except InputError as error:
        problems += error.messages
    path = Path(data).expanduser().resolve() if data else None
    try:
        spec = recipe.load(RECIPES, model, changes, str(path) if path else None)
    except InputError as error:
        problems += error.messages
    if spec is None or site is None or problems:
        raise InputError(problems)
    cache = site.cache_dir(CHECKOUT)
    init_adapter = planned = size = None
    try:
        path, digest, size = _data(spec, cache, internet=site.compute_internet)
    except InputError as error:
        problems += error.messages
    try:
        files = modelfiles.locate(
            spec.model.name, spec.model.revision, checkout=CHECKOUT, cache=cache, internet=site.compute_internet
        )
        shape = shapes.from_config(files.config, spec.model.name)
        problems += fits.problems(spec, shape)
        if spec.model.init_from:
            init, init_adapter = modelfiles.start(spec.model.init_from, runs=RUNS, checkout=CHECKOUT)
            start = shapes.from_config(init.config, init.path) if init else None
            problems += fits.start_problems(spec, shape, start, init_adapter)
            files, shape = init or files, start or shape
        planned = plan.make(spec, site, shape, data_bytes=size)
    except InputError as error:
        problems += error.messages
    if problems or planned is None:
        raise InputError(problems)
    words = {"MODEL": model, "DATA": str(path or ""), "CLUSTER": site.name, "SET": settings}
    said = {k: v for k, v in words.items() if v}
    return Wish(spec, site, planned, files, path, digest, cache, init_adapter, said)


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


def files_of(wish: Wish, name: str) -> dict[str, Any]:
    """The JSON files a new run folder begins with."""
    provenance = {
        "run": name,
        "cluster": wish.profile.name,
        "profile": wish.profile.model_dump(mode="json"),
        "checkout": str(CHECKOUT),
        "cache": str(wish.cache),
        "model_path": wish.model.path,
        "init_adapter": str(wish.init_adapter) if wish.init_adapter else None,
        "data_path": str(wish.data_path) if wish.data_path else None,
        "data_digest": wish.data_digest,
        "said": wish.words,
        "python": sys.executable,
        "python_version": platform.python_version(),
        "user": getpass.getuser(),
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_version(),
        "locks": {path.name: file_digest(path)[:16] for path in sorted((CHECKOUT / "env").glob("*.lock"))},
    }
    return {
        "spec.json": wish.spec.model_dump(mode="json"),
        "plan.json": wish.plan.model_dump(mode="json"),
        "provenance.json": provenance,
    }


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


def run_name(wish: Wish, *, new: bool) -> str:
    """The wish's run, or with `new` the next free suffix of it."""
    if not new or not (RUNS / wish.name).exists():
        return wish.name
    number = 2
    while (RUNS / f"{wish.name}-{number}").exists():
        number += 1
    return f"{wish.name}-{number}"


def stored_profile(run: rundir.RunDir) -> ClusterProfile:
    """The profile a run was submitted with."""
    return ClusterProfile.model_validate_json(json.dumps(run.provenance()["profile"]))
