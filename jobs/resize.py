"""Another number of nodes for a run that exists: a new plan of the same wish, the global batch unchanged."""

from __future__ import annotations

import json
from pathlib import Path

from ftlib import atomic, modelfiles
from ftlib.errors import InputError
from ftlib.plan import plan, shapes
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.spec import divisors
from jobs.wish import CHECKOUT


def resize(run: RunDir, profile: ClusterProfile, nodes: str, busy: list[str]) -> None:
    """Plan the run's training for so many nodes, as people said it. InputError where that cannot be; `busy`: stages
    with a job, which has its size already."""
    if not nodes.isdigit() or nodes == "0":
        raise InputError(f"NODES: {nodes!r} is no number of nodes; allowed: 1 and more")
    if run.stage_done("train"):
        raise InputError(f"NODES: the training of {run.name} is done; there is nothing to go on with")
    if busy:
        raise InputError(
            f"NODES: {', '.join(busy)} of {run.name} is queued or running with the nodes it has. "
            f"make cancel RUN={run.name}, and once that has ended make resume RUN={run.name} NODES={nodes}"
        )
    spec, provenance, before = run.spec(), run.provenance(), run.plan()
    files = modelfiles.locate(
        provenance["model_path"], spec.model.revision, checkout=CHECKOUT, cache=Path(provenance["cache"]), internet=True
    )
    world = int(nodes) * spec.resources.gpus_per_node
    share = spec.train.global_batch // world
    # What fitted until now, as earlier lives may have taught it.
    fitting = [rows for rows in divisors(max(1, share)) if rows <= before["micro_batch"]]
    resources = spec.resources.model_copy(update={"nodes": int(nodes)})
    train = spec.train.model_copy(update={"micro_batch": fitting[-1]})
    wish = spec.model_copy(update={"resources": resources, "train": train})
    data = provenance["data_path"]
    size = Path(data).stat().st_size if data and Path(data).exists() else None
    made = plan.make(wish, profile, shapes.from_config(files.config, spec.model.name), data_bytes=size)
    with run.claim():
        taught = {k: v for k, v in run.adjustments().items() if k not in ("micro_batch", "accumulation")}
        if run.adjustments_file.exists():
            atomic.write_json(run.adjustments_file, taught)
        atomic.write_json(run.plan_file, json.loads(made.model_dump_json()))
    print(
        f"{run.name} goes on with {nodes} node{'s' if nodes != '1' else ''}: micro-batch {made.micro_batch} x "
        f"accumulation {made.accumulation} x {made.world_size} GPUs, {spec.train.global_batch} rows a step as before"
    )
