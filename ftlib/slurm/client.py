"""Talking to Slurm's commands: which cluster this is, the queue, accounting, cancel. Few calls, each batched."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

from ftlib.errors import FtError, Unavailable
from ftlib.runs.scheduler import Job as Job

TIMEOUT_S = 60
FIELDS, SEPARATOR = ("%i", "%T", "%r", "%k", "%S"), "\x1f"
# The longest argument that Linux passes on is 128 KiB.
MOST_LISTED = 120_000


class AccountingDisabled(Unavailable):
    """The cluster keeps no accounts (accounting_storage/none): what the controller has forgotten nobody knows."""


class Refused(FtError):
    """sbatch would not queue `what`. Its `reason` ends the error that submitit raised; empty where sbatch gave none."""

    def __init__(self, what: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        self.reason = lines[-1].rpartition("error: ")[2] if lines else ""
        super().__init__(f"sbatch refused {what}: {self.reason or 'it ended without a reason'}")


class NoSuchCommand(Unavailable):
    """This machine has no such Slurm command."""


def use(slurm_conf: str | None) -> None:
    """Make every later Slurm command of this process speak to one cluster, and only as we say."""
    # SBATCH_* would override our scripts, and a SLURM_* of an interactive job would shape ours.
    for name in list(os.environ):
        if name.startswith(("SBATCH_", "SLURM_")) and name != "SLURM_CONF":
            del os.environ[name]
    if slurm_conf:
        os.environ["SLURM_CONF"] = slurm_conf


def call(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """A Slurm command's output, times in seconds since 1970. Unavailable when there is no such command or no answer."""
    try:
        said = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=said)
    except FileNotFoundError:
        raise NoSuchCommand(f"{command[0]}: there is no such command here. Is this a login node?") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} did not answer in {timeout_s} s; is the scheduler busy? Try again") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:3])} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def cluster_name() -> str | None:
    """The ClusterName scontrol reports; None where there is no Slurm or none is configured."""
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return None
    try:
        text = call("scontrol", "show", "config")
    except Unavailable as error:
        if "configuration source" in str(error):
            return None  # the client's package without any cluster behind it
        raise
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ClusterName":
            return value.strip()
    return None


def jobs(users: Iterable[str] = ()) -> list[Job]:
    """The jobs of `users` (mine without any) that the controller still remembers, finished ones for a while."""
    whose = f"--user={','.join(sorted(users))}" if users else "--me"
    text = call("squeue", whose, "--noheader", "--array", "--states=all", f"--format={SEPARATOR.join(FIELDS)}")
    rows = (line.split(SEPARATOR) for line in text.splitlines())
    return [Job(row[1], row[2], row[3], row[4], row[0]) for row in rows if len(row) == len(FIELDS)]


def accounted(ids: Iterable[str]) -> list[Job]:
    """The last known state of `ids` in the accounting database, in one call; nothing for those it does not know.

    AccountingDisabled where the cluster keeps no accounts; Unavailable where they cannot be read now.
    """
    # An array is asked for as a whole: its tasks would not fit in a command line.
    listed = ",".join(sorted({job.partition("_")[0] for job in ids}, key=lambda job: (len(job), job)))
    if not listed:
        return []
    # So many jobs are of many months: the oldest are left out.
    listed = listed[-MOST_LISTED:].partition(",")[2] if len(listed) > MOST_LISTED else listed
    try:
        text = call("sacct", "-X", "-n", "-P", "-j", listed, "-o", "JobID,State")
    except Unavailable as error:
        if "accounting storage is disabled" in str(error).lower():
            raise AccountingDisabled(str(error)) from None
        raise
    rows = (line.split("|") for line in text.splitlines())
    return [Job(row[1].split(" ")[0], id=row[0]) for row in rows if len(row) == 2]


def cancel(ids: Iterable[str]) -> None:
    """scancel; jobs that are gone already are no error. Unavailable where Slurm does not answer."""
    listed = list(ids)
    if not listed:
        return
    try:
        call("scancel", *listed)
    except Unavailable as error:
        if "already" not in str(error) and "Invalid job id" not in str(error):
            raise
