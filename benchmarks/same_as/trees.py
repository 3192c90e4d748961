"""The two trees that are compared, each in a folder of its own, and commands that are run in them."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

CHECKOUT = Path(__file__).resolve().parents[2]
# Variables of a person's shell, a site or an outer job that would change what is planned, or how it is computed.
FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SUBMITIT_", "FT_", "HF_", "TRANSFORMERS_", "WANDB_", "OPT_", "PYTHON")
COMMAND_TIMEOUT_S = 600

T = TypeVar("T")


class Trouble(Exception):
    """The comparison cannot be made."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


def export_commit(commit: str, folder: Path) -> None:
    """Write the files of `commit` to `folder`. Raises Trouble where git does not know it."""
    done = subprocess.run(["git", "-C", str(CHECKOUT), "archive", commit], capture_output=True, timeout=60)
    if done.returncode:
        raise Trouble(f"COMMIT={commit}: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def export_this_tree(folder: Path) -> None:
    """Write the checkout's files to `folder` as they are now: committed, changed and new ones, but none that git
    ignores."""
    listed = ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Trouble(f"{CHECKOUT}: {done.stderr.strip()}")
    for name in filter(None, done.stdout.split("\0")):
        source, target = CHECKOUT / name, folder / name
        if source.is_file():  # a deleted file is still listed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def copy_of(tree: Path, folder: Path) -> Path:
    """A copy of `tree`, so that a case has runs and caches of its own."""
    shutil.copytree(tree, folder)
    return folder


def start(tree: Path, words: list[str], cpu: int) -> subprocess.Popen[str]:
    """Start `python -m jobs WORDS` in `tree`, on one CPU: the plan then has one thread, as on every other machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    command = ["taskset", "-c", str(cpu), sys.executable, "-m", "jobs", *words]
    return subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(process: subprocess.Popen[str], timeout_s: float = COMMAND_TIMEOUT_S) -> Ended:
    """The end of a started command; one that takes too long is killed with all its children, and Trouble is raised."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Trouble(f"not within {timeout_s} s: {process.args!r}") from None
    return Ended(process.returncode, stdout, stderr)


def run(tree: Path, words: list[str], cpu: int) -> Ended:
    """`start` and `wait`."""
    return wait(start(tree, words, cpu))


class Cpus:
    """Runs functions at once, one on each of this process's CPUs; a function is given the CPU that it may use."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        self._free: queue.Queue[int] = queue.Queue()
        for cpu in cpus:
            self._free.put(cpu)
        self._pool = ThreadPoolExecutor(max_workers=len(cpus))

    def submit(self, function: Callable[[int], T]) -> Future[T]:
        """Run `function(cpu)` as soon as a CPU is free."""

        def on_free_cpu() -> T:
            cpu = self._free.get()
            try:
                return function(cpu)
            finally:
                self._free.put(cpu)

        return self._pool.submit(on_free_cpu)

    def cancel(self) -> None:
        """Start nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
