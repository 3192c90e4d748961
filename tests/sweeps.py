"""A copied checkout on a login node of shims, whose sweeps are queued, end and are queued again as a test says."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.rundir import STAGES, RunDir
from ftlib.sweepdir import SweepDir, share_prepared
from tests.array_shims import ACTIVE, Login, Queue
from tests.wishes import copied_checkout

TASKS = STAGES[1:]
# The jobs of a point on the local Slurm, by the names of their stages; the first is one for a dataset.
JOBS = ("prepare", "train", "export+evaluate")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, its runs and cache its own."""
    return copied_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def file(checkout: Path) -> Callable[..., str]:
    """Writes a sweep's file; returns its name, each its own."""

    def write(text: str) -> str:
        name = f"s{len(list((checkout / 'jobs' / 'sweeps').iterdir()))}"
        (checkout / "jobs" / "sweeps" / f"{name}.yaml").write_text(text)
        return name

    return write


@pytest.fixture
def login(checkout: Path, tmp_path: Path) -> Login:
    return fresh(checkout, tmp_path)


def fresh(checkout: Path, tmp_path: Path, **limits: str) -> Login:
    """A login node without runs. Thousands of folders are moved away faster than removed."""
    if (checkout / "runs").exists():
        (checkout / "runs").rename(tmp_path / "before")
    return Login(checkout, tmp_path, **limits)


def seeds(count: int, more: str = "") -> str:
    return f"grid: {{train.seed: [{', '.join(map(str, range(count)))}]}}\n{more}"


def swept(login: Login, name: str, *words: str, settings: str = "", **environment: str) -> str:
    wish = ("--cluster", "local-slurm", "--set", f"tracking.mode=disabled {settings}")
    done = login.jobs("sweep", "--sweep", name, *wish, *words, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def place(login: Login) -> SweepDir:
    (found,) = (login.checkout / "runs" / "sweeps").iterdir()
    return SweepDir(found)


def queued(login: Login, *states: str) -> Counter[str]:
    """Tasks of each kind of job in one of the states."""
    queue = login.queue
    return Counter(queue.arrays[array]["comment"].split(" ")[2] for array, _ in queue.tasks(*(states or ACTIVE)))


def run_of(login: Login, array: str, index: str) -> RunDir:
    nonce = login.queue.arrays[array]["comment"].split(" ")[3]
    return RunDir(place(login).runs / os.readlink(place(login).arrays / nonce / index).rpartition("/")[2])


def complete(login: Login, *arrays: str) -> None:
    """Let every queued task of the arrays end well."""
    queue = login.queue
    for array in arrays:
        stages = queue.arrays[array]["comment"].split(" ")[2].split("+")
        for index, now in queue.arrays[array]["tasks"].items():
            if now in ACTIVE:
                run = run_of(login, array, index)
                for stage in stages:
                    (run.outcomes / f"{stage}-1").write_text("0 done\n")
                if "prepare" in stages:
                    run.prepared_file.write_text("{}")
                    share_prepared(run, run.siblings())
                queue.arrays[array]["tasks"][index] = "COMPLETED"
    queue.save()


def fail(login: Login, array: str, index: str, words: str = "1 it always fails") -> RunDir:
    """Let a task fail as its epilogue would have it, and what waits for it be cancelled."""
    queue = login.queue
    queue.arrays[array]["tasks"][index] = "FAILED"
    position = list(queue.arrays).index(array)
    for later in list(queue.arrays)[position + 1 :]:
        if f"aftercorr:{array}" in queue.arrays[later]["dependency"]:
            queue.arrays[later]["tasks"][index] = "CANCELLED"
            array = later
    queue.save()
    return run_of(login, array, index)


def feeder(login: Login) -> str:
    """What the feeder's job prints; it is running while it does."""
    queue = login.queue
    job = queue.of("feeder")[-1]
    queue.arrays[job]["tasks"][""] = "RUNNING"
    queue.save()
    done = login.python("-m", "jobs.feeder", str(place(login).path))
    queue = login.queue
    queue.arrays[job]["tasks"][""] = "COMPLETED"
    queue.save()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def strangers(queue: Queue, count: int) -> None:
    """So many running tasks that are not the sweep's."""
    tasks = {str(number): "RUNNING" for number in range(count)}
    queue.arrays["900"] = {"comment": "a stranger of mine", "dependency": "", "array": "", "script": "", "tasks": tasks}
    queue.save()
