"""What benchmarks share: a prepared run, lives of its training as processes of their own, tables."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftlib import rundir
from ftlib.metrics import read_metrics
from ftlib.plan.plan import RunPlan
from ftlib.rundir import RunDir
from ftlib.runs.events import FirstStep
from ftlib.slurm import batch
from ftlib.stop import StopFlag
from jobs import wish as wishes

# The local Slurm that `make cluster` starts.
CONF = Path(os.environ.get("FTLIB_SLURM_DIR") or "/tmp/ftlib-slurm") / "slurm.conf"
CHECKOUT = wishes.CHECKOUT
LIFE = "import sys; from jobs import stage; stage.run(sys.argv[1], 'train')"


def prepared_run(place: Path, settings: str, *, recipe: str = "tiny", cache: Path | None = None,
                 kill_every_h: float | None = None) -> RunDir:
    """A run in the folder `place`, with its data prepared: one of the same name elsewhere is the same run.
    cache: shared by several. kill_every_h: what the profile would say."""
    from ftlib.data.prepare import prepare

    wish = wishes.make(model=recipe, data=None, cluster="local", settings=settings)
    files = wishes.files_of(wish, place.name)
    files["provenance.json"]["cache"] = str(cache or place.parent / "cache")
    if kill_every_h is not None:
        files["provenance.json"]["profile"]["scheduler"] = {"kill_every_h": kill_every_h}
    run = rundir.create(place.parent, place.name, files, wishes.SNAPSHOT)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(run, StopFlag())
    return run


def sha(folder: Path) -> str:
    """Of all tensors in a checkpoint: weights, and the optimizer's state, each rank's own (files may share tensors in
    another way and be equal), with the numbers beside them."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()

    def walk(value: Any) -> None:
        if torch.is_tensor(value):
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif isinstance(value, int | float):
            digest.update(repr(value).encode())

    for path in sorted([*folder.rglob("*optim*.pt"), *folder.rglob("*.safetensors")]):
        walk(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False))
    return digest.hexdigest()


def environment(run: RunDir, life: int) -> dict[str, str]:
    """A training job's environment, as its batch script would set it."""
    plan = RunPlan.model_validate(run.plan()).model_copy(update={"threads": run.numerics().threads})
    cache, profile = Path(run.provenance()["cache"]), wishes.load_profile("local", {})
    variables = batch.environment(profile, plan, "train", run=run.path, cache=cache)
    return {**os.environ, **variables, "FT_LIFE": str(life)}


def start(run: RunDir, life: int) -> subprocess.Popen[bytes]:
    """A life of the training stage, as Slurm would start it."""
    (run.lives / f"train-{life}").write_text(f"0 here {int(time.time())}\n", encoding="utf-8")
    with (run.slurm / "train.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", LIFE, str(run.path)], cwd=run.code, env=environment(run, life), stdout=log,
            stderr=subprocess.STDOUT)  # fmt: skip


def first_step(run: RunDir, life: int, process: subprocess.Popen[bytes], timeout_s: float = 120) -> FirstStep:
    """The event of the life's first new step, waited for."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        if event := run.ledger().last(FirstStep, "train", life):
            return event
        time.sleep(0.05)
    log = (run.slurm / "train.log").read_text(encoding="utf-8", errors="replace")
    raise SystemExit(f"life {life} made no step:\n{log[-3000:]}")


def steps_done(run: RunDir) -> int:
    """The last step whose row is written."""
    return max((row["step"] for row in read_metrics(run.metrics_file)), default=0)


def print_or_dump(found: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """The result as one line of JSON, or as `show` prints it."""
    print(json.dumps(found)) if as_json else show(found)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """A table on the terminal, its first `left` columns of words and the others of figures."""
    table = Table(title=title, box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def spread(values: Sequence[float], digits: int = 2) -> list[str]:
    """Median, least and most."""
    return [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
