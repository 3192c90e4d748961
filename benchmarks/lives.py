"""What benchmarks share: a prepared run of the tiny model, and lives of its training as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ftlib import events, rundir
from ftlib.metrics import read_metrics
from ftlib.plan.plan import RunPlan
from ftlib.rundir import RunDir
from ftlib.slurm import batch
from ftlib.stop import StopFlag
from jobs import wish as wishes

LIFE = "import sys; from jobs import stage; stage.run(sys.argv[1], 'train')"


def prepared_run(folder: Path, settings: str, kill_every_h: float | None = None) -> RunDir:
    """A run of the tiny recipe in `folder`, with its data prepared. kill_every_h: what the profile would say."""
    from ftlib.data.prepare import prepare

    wish = wishes.make(model="tiny", data=None, cluster="local", settings=settings)
    files = wishes.files_of(wish, wish.name)
    files["provenance.json"]["cache"] = str(folder / "cache")
    if kill_every_h is not None:
        files["provenance.json"]["profile"]["scheduler"] = {"kill_every_h": kill_every_h}
    run = rundir.create(folder / "runs", wish.name, files, wishes.SNAPSHOT)
    prepare(run, StopFlag())
    return run


def environment(run: RunDir, life: int) -> dict[str, str]:
    """A training job's environment, as its batch script would set it."""
    plan, cache = RunPlan.model_validate(run.plan()), Path(run.provenance()["cache"])
    profile = wishes.load_profile("local", {})
    variables = batch.environment(profile, plan, "train", run=run.path, cache=cache)
    return {**os.environ, **variables, "FT_LIFE": str(life)}


def start(run: RunDir, life: int) -> subprocess.Popen[bytes]:
    """A life of the training stage, as Slurm would start it."""
    (run.lives / f"train-{life}").write_text(f"0 here {int(time.time())}\n", encoding="utf-8")
    with (run.slurm / "train.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", LIFE, str(run.path)], cwd=run.code, env=environment(run, life), stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def first_step(run: RunDir, life: int, process: subprocess.Popen[bytes], timeout_s: float = 120) -> dict[str, Any]:
    """The event of the life's first new step, waited for."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        for event in events.read(run.events):
            if event["event"] == "first_step" and event["life"] == life:
                return event
        time.sleep(0.05)
    log = (run.slurm / "train.log").read_text(encoding="utf-8", errors="replace")
    raise SystemExit(f"life {life} made no step:\n{log[-3000:]}")


def steps_done(run: RunDir) -> int:
    """The last step whose row is written."""
    return max((row["step"] for row in read_metrics(run.metrics_file)), default=0)


def print_or_dump(found: dict[str, Any], as_json: bool, show: Any) -> None:
    """The result as one line of JSON, or as `show` prints it."""
    if as_json:
        print(json.dumps(found))
    else:
        show(found)
