"""`packages`: install the training packages, several GB, in a CPU job where there is a Slurm; `make` calls it.

The job runs env/setup.sh, which writes its stamp last: nothing half-installed is used. Where there is no Slurm, and
where compute nodes have no internet, `make` installs them on this machine.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ftlib import recipe, state
from ftlib.errors import DONE, FtError, InputError
from ftlib.profile import ClusterProfile
from ftlib.runs import comments
from ftlib.slurm import batch, client
from jobs import logs
from jobs import wish as wishes
from jobs.chain import ModuleExecutor

# For make: install them here.
HERE = 3
LIMIT_MIN = 60
MEM_GIB = 8
CPUS = 4
FOLDER = "packages"


def packages(options: argparse.Namespace) -> int:
    """Install in a job, and show its log until it has ended; HERE where `make` is to install them on this machine."""
    _, changes = recipe.parse_set(options.set)
    profile = wishes.load_profile(options.cluster, changes)
    if profile.container is not None:
        return DONE  # the image brings them
    if profile.scheduler is None:
        return HERE
    if not profile.compute_internet:
        print(f"Compute nodes of {profile.name} have no internet, so the training packages are installed here.")
        return HERE
    if missing := profile.missing_account():
        raise InputError(missing)
    stamp = wishes.CHECKOUT / options.stamp
    client.use(profile.scheduler.slurm_conf)
    folder = profile.cache_dir(wishes.CHECKOUT) / FOLDER
    job = _queued(stamp) or _queue(profile, folder, options.venv, options.stamp)
    log = folder / f"{job}_0_log.out"
    print(f"Job {job} installs the training packages; its log is {log}. Ctrl-C leaves it at work.", flush=True)
    try:
        last_state = logs.follow(job, log, profile, stamp.exists)
    except KeyboardInterrupt:
        print(f"\nJob {job} goes on without you: the same command waits for it again, scancel {job} ends it.")
        raise
    if not stamp.exists():
        raise FtError(
            f"job {job} ended before the packages were installed (Slurm says {last_state}); its messages are above "
            f"({log}). Run the same command again to continue; 'make setup' installs them on this machine instead")
    return DONE


def _comment(stamp: Path) -> str:
    """By which the job is found again: the stamp's name holds a digest of the locks."""
    return comments.shared("packages", str(stamp))


def _queued(stamp: Path) -> str | None:
    """The job that installs these packages already."""
    for job in client.jobs():
        if job.comment == _comment(stamp) and state.SLURM_STATES.get(job.state) in state.ACTIVE:
            return job.id
    return None


def _queue(profile: ClusterProfile, folder: Path, venv: str, stamp: str) -> str:
    """Queue the job; returns its id."""
    batch.check_path(folder)
    partition = profile.partition(gpu=False)
    # A proxy, where the site needs one.
    variables = {**profile.environment, **partition.environment}
    executor = _Installation(folder, venv=venv, stamp=stamp)
    parameters = batch.small_parameters(
        profile, name="ftlib.packages", setup=batch.enter(profile, variables, wishes.CHECKOUT),
        comment=_comment(wishes.CHECKOUT / stamp), time_min=LIMIT_MIN, mem_gib=MEM_GIB, cpus=CPUS,
    )  # fmt: skip
    # A second attempt would have to make the environment anew, under the feet of who waits for it here.
    further = parameters["additional_parameters"]
    further.pop("requeue", None)
    further["no-requeue"] = True
    executor.update_parameters(**parameters)
    return executor.queue("the installation of packages")


class _Installation(ModuleExecutor):
    """A job that runs env/setup.sh."""

    def __init__(self, folder: Path, *, venv: str, stamp: str) -> None:
        super().__init__(folder, python="", module="")
        self._venv = venv
        self._stamp = stamp

    @property
    def _submitit_command_str(self) -> str:
        return shlex.join(["sh", "env/setup.sh", "train", self._venv, self._stamp])
