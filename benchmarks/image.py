"""The tiny chain inside the image beside the same chain outside it, on the local Slurm: equal, bit for bit?

`make test-image` builds the image from a local Debian folder, as a job in front of the first run's chain; interrupts
runs inside it in three ways; takes one run from outside to inside and one the other way; and trains on two nodes. Exit
code 0: every run ended, and equals the one outside that nothing touched.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.chaos import slurm
from benchmarks.chaos.campaign import FLAVOURS, SEEN, Ground, differences
from benchmarks.chaos.kinds import KINDS, next_life_begun
from benchmarks.chaos.places import PLACES, raw_rows, stand_at
from benchmarks.chaos.processes import thaw
from ftlib.checkpoint import digest
from ftlib.rundir import RunDir
from ftlib.runs.events import Started

ONE, TWO = list(FLAVOURS)[:2]
SHARED, SHARE = "DDP, 1 node x 2 ranks", "resources.gpus_per_node=2"
# Each with a place where the run stands when it comes; all in one run.
KILLS = (
    ("preemption with grace", "a step"), ("time limit", "accumulation"), ("SIGKILL of a worker", "checkpoint write"))
# The build, too, on a machine with other work.
WAIT_S = 3600


@dataclass
class Row:
    """One run, and what came out."""

    what: str
    flavour: str
    run: RunDir
    state: str
    lives: int
    differences: list[str]

    @property
    def right(self) -> bool:
        """Ended, and equal to its reference."""
        return self.state == "completed" and not self.differences


def apptainer() -> tuple[str, str]:
    """(command, base folder): the local ones of env/local_apptainer.sh; a command on PATH is taken before its own."""
    script = slurm.CHECKOUT / "env" / "local_apptainer.sh"
    done = subprocess.run(["sh", script, "up"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise slurm.Trouble("no Apptainer: its words are above")
    folder = done.stdout.strip()
    return shutil.which("apptainer") or f"{folder}/bin/apptainer", f"{folder}/base"


class Campaign:
    """The runs, one after the other; each is laid beside the first of its ranks, outside and untouched."""

    def __init__(self, folder: Path, images: Path) -> None:
        # A name that must pass through sbatch, bash, Apptainer's binds and Python.
        self.ground = Ground(folder / "ada's \"copy\", a:b $HOME")
        command, base = apptainer()
        said = {"command": command, "base": base, "build": "job", "images": str(images)}
        self.inside = " ".join(shlex.quote(f"cluster.container.{key}={value}") for key, value in said.items())
        self.rows: list[Row] = []
        self.references: dict[str, RunDir] = {}

    def add(self, what: str, flavour: str, run: RunDir) -> None:
        """Wait for the run's end and compare it."""
        ended = self.ground.finish(run, WAIT_S)
        reference = self.references.setdefault(flavour, run)
        found = differences(run, reference) if ended == "completed" else []
        lives = len(list(run.lives.glob("*")))
        self.rows.append(Row(what, flavour, run, ended, lives, found))
        print(f"  {what}: {ended}, {'; '.join(found) or 'no difference'}", flush=True)

    def killed(self) -> None:
        """A run inside the image whose training is ended in each of the ways."""
        run = self.ground.submit(ONE, self.inside)
        for kind, place in KILLS:
            view = stand_at(run, PLACES[place], "train", SEEN, WAIT_S)
            if view is None:
                raise slurm.Trouble(f"{run.name} was never at {place}")
            KINDS[kind].do(view, Random(0))
            slurm.until(lambda view=view: next_life_begun(view), WAIT_S, "the next life")  # type: ignore[misc]
            thaw(view.workers)
        self.add(f"inside: {', '.join(kind for kind, _ in KILLS)}", ONE, run)

    def moved(self) -> None:
        """A run that begins outside, is cancelled as it trains, goes on inside, and the same back again."""
        run = self.ground.submit(ONE)
        for step, go_on in ((25, self.inside), (55, "cluster.container=null")):
            slurm.until(lambda step=step: _last_step(run) >= step, WAIT_S, f"step {step} of {run.name}")  # type: ignore[misc]
            self.ground.jobs("cancel", "--run", run.name)
            slurm.until(lambda: self._train(run) == "cancelled", WAIT_S, f"the end of the cancelled {run.name}", 1)
            self.ground.jobs("resume", "--run", run.name, "--set", go_on)
        self.add("begun outside, resumed inside, resumed outside", ONE, run)

    def _train(self, run: RunDir) -> str:
        return str(self.ground.state(run)["stages"]["train"]["state"])


def _last_step(run: RunDir) -> int:
    return max((row["step"] for row in raw_rows(run.metrics_file)), default=0)


def campaign(made: Campaign) -> None:
    """All rows of the table, in order."""
    made.add("outside", ONE, made.ground.submit(ONE))
    made.add("inside; its image was built by a job in front of the chain", ONE, made.ground.submit(ONE, made.inside))
    made.killed()
    made.moved()
    made.add("outside", TWO, made.ground.submit(TWO))
    made.add("inside", TWO, made.ground.submit(TWO, made.inside))
    made.add("outside", SHARED, made.ground.submit(ONE, SHARE))
    made.add("inside", SHARED, made.ground.submit(ONE, f"{SHARE} {made.inside}"))


def images_of(run: RunDir) -> list[str]:
    """In which image each life of the training was: its hash's beginning, or `-` outside."""
    found = run.ledger().of(Started, "train")
    return [(started.image or "-").partition("sha256:")[2][:8] or "-" for started in found]


def markdown(made: Campaign, log: str, minutes: float) -> str:
    """The page's table, with the build's own words."""
    ready = re.search(r"image: (ready after .*)", log)
    tested = re.search(r"image test: (.*)", log)
    assert ready and tested, log
    lines = [
        f"Written by `make test-image` in {minutes:.0f} minutes, on {os.cpu_count()} cores under a load of "
        f"{os.getloadavg()[2]:.0f}. The build, a job in front of the second run's chain, said: {ready[1]}. Its own "
        f"test said: {tested[1]}.",
        "", "| run | ranks | image of each training life | merged weights | adapter | equal to outside |",
        "|---|---|---|---|---|---|"]
    for row in made.rows:
        files = (row.run.export / "merged/model.safetensors", row.run.export / "adapter/adapter_model.safetensors")
        hashes = [digest(file)[:12] if file.exists() else "missing" for file in files]
        equal = "the reference" if row.run is made.references[row.flavour] else "yes" if row.right else "**no**"
        lives = ", ".join(images_of(row.run))
        lines.append(f"| {row.what} | {row.flavour} | {lives} | {' | '.join(hashes)} | {equal} |")
    return "\n".join(lines) + "\n"


MARK = "<!-- the table, by make test-image -->\n"


def main() -> int:
    """Run it all, print the table, and put it into the page."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.image", description=__doc__)
    options.add_argument("--write", type=Path, metavar="FILE", help="put the table into that page, below its mark")
    options.add_argument("--images", type=Path, metavar="FOLDER", help="where an earlier campaign left its image")
    said = options.parse_args()
    began, was_up = time.monotonic(), slurm.up()
    slurm.heal()
    folder = Path(tempfile.mkdtemp(prefix="ftlib-image-test-"))
    images = said.images or folder / "images"
    made = Campaign(folder, images)
    good = False
    try:
        campaign(made)
        (log,) = (images / "slurm").glob("*_0_log.out")
        text = markdown(made, log.read_text(), (time.monotonic() - began) / 60)
        print(text)
        if said.write:
            page = said.write.read_text(encoding="utf-8").partition(MARK)[0]
            said.write.write_text(page + MARK + text, encoding="utf-8")
        good = all(row.right for row in made.rows)
    except slurm.Trouble as trouble:
        print(f"test-image: {trouble}", file=sys.stderr)
    finally:
        slurm.heal()
        made.ground.cancel()
        if not was_up:
            slurm.down()
    if good:
        shutil.rmtree(folder)
    else:
        print(f"The runs are in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
