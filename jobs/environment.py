"""What a login node can see of a site's faults before anything is queued: folders, home's quota, modules, names."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ftlib.errors import InputError, Unavailable, nearest
from ftlib.profile import ClusterProfile
from ftlib.slurm import batch, client
from jobs import image, quota
from jobs import wish as wishes

# Some room for what other programs keep in a home folder; a full one breaks logins.
HOME_FULL = 0.97


def require(profile: ClusterProfile, cache: Path, *, at_a_glance: bool = False) -> None:
    """InputError with every fault that can be seen from here, each with its mend. Builds the image where that is here.

    at_a_glance: nothing that asks quota, modules or Slurm.
    """
    found = [missing] if (missing := profile.missing_account()) else []
    found += _misplaced(profile, cache)
    if not at_a_glance:
        found += _full_home(profile) + quota.problems(profile) + _modules(profile) + _interpreter(profile)
        if profile.scheduler and not missing:
            found += [f"cluster {profile.name}: {words}" for words in unknown_names(profile)]
    if found:
        raise InputError(found)
    image.ready(profile)


def _misplaced(profile: ClusterProfile, cache: Path) -> list[str]:
    """What would fill a home folder that the profile calls small."""
    if profile.storage.home_gib is None:
        return []
    home, work = Path.home().resolve(), profile.work_dir()
    mends = {
        "the checkout, with its packages and runs,": (wishes.CHECKOUT, f"move it to {work or 'group storage'}"),
        "the cache": (cache, "name a folder on group storage as 'cache' in cluster.yaml"),
    }
    return [
        f"{what} would be in your home folder ({place}), which holds {profile.storage.home_gib:.0f} GiB here: {mend}"
        for what, (place, mend) in mends.items()
        if home in (place.resolve(), *place.resolve().parents)
    ]


def _full_home(profile: ClusterProfile) -> list[str]:
    if profile.storage.home_gib is None or (share := _home_share()) is None or share < HOME_FULL:
        return []
    return [
        f"your home folder is {share:.0%} full: caches there (~/.cache, ~/.apptainer, ~/.local) can be deleted; "
        "'du -sh ~/.[!.]* ~/*' shows what is large"
    ]


def _home_share() -> float | None:
    """How full the home folder is, by its quota where quota(1) tells one for it, else by its file system."""
    home = Path.home()
    try:
        device = subprocess.run(["df", "-P", home], capture_output=True, text=True, timeout=30).stdout.splitlines()[-1]
        quota = ["quota", "-w"] if shutil.which("quota") else ["true"]
        counted = subprocess.run(quota, capture_output=True, text=True, timeout=30).stdout
        for row in map(str.split, counted.splitlines()):
            if len(row) > 3 and row[0] == device.split()[0]:
                used, soft, hard = (float(word.rstrip("*")) for word in row[1:4])
                if soft or hard:
                    return used / (soft or hard)
        there = shutil.disk_usage(home)
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None  # a site's own way to count: nothing is known
    return 1 - there.free / there.total


def _modules(profile: ClusterProfile) -> list[str]:
    """Modules that cannot be loaded; a job's shell gets `module` from the shell that submits it."""
    found = []
    for module in profile.modules:
        words = f"module load {shlex.quote(module)}"
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, env=os.environ)
        said = (done.stderr.strip().splitlines() or [""])[0]
        if done.returncode or "ERROR" in done.stderr:
            found.append(
                f"{words} fails: {said}. 'module spider {module.partition('/')[0]}' lists what there is; the names are "
                "'modules' in cluster.yaml"
            )
    return found


def _interpreter(profile: ClusterProfile) -> list[str]:
    """The jobs' Python, if it needs a library path of the login shell: jobs do not inherit that."""
    if profile.scheduler is None or profile.modules:
        return []  # a module may bring what it needs
    python = profile.python or sys.executable
    clean = {name: value for name, value in os.environ.items() if name not in batch.NOT_INHERITED}
    try:
        done = subprocess.run([python, "-c", ""], env=clean, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"the jobs' interpreter {python} cannot be run here: {error}"]
    if done.returncode == 0:
        return []
    said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return [
        f"the jobs' interpreter {python} does not start without your shell's LD_LIBRARY_PATH, which jobs do not "
        f"inherit: {said}. Name the module that brings its libraries as 'modules' in cluster.yaml"
    ]


def unknown_names(profile: ClusterProfile) -> list[str]:
    """A line for each name of the profile that this cluster does not know, with those it knows. Two questions."""
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    return _account(profile) + _partitions(profile)


def _account(profile: ClusterProfile) -> list[str]:
    """What accounting allows this person; nothing where it does not tell."""
    asked = ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos")
    try:
        rows = [line.split("|") for line in client.call(*asked).splitlines()]
    except Unavailable:
        return []
    allowed: dict[str, set[str]] = defaultdict(set)
    for account, qos in (row for row in rows if len(row) == 2):
        allowed[account] |= set(filter(None, qos.split(",")))
    if not allowed or profile.account is None:
        return []
    if profile.account not in allowed:
        return [_unknown("account", profile.account, allowed)]
    known = allowed[profile.account]
    wanted = {profile.resolved_qos(gpu=True), profile.resolved_qos(gpu=False)} - {None}
    return [_unknown("qos", str(qos), known) for qos in sorted(map(str, wanted - known))] if known else []


def _partitions(profile: ClusterProfile) -> list[str]:
    gres: dict[str, set[str]] = defaultdict(set)
    for line in client.call("sinfo", "-h", "-o", "%R|%G").splitlines():
        name, _, offered = line.partition("|")
        # gpu:a100:2(S:0-1) or gpu:2
        gres[name] |= set(re.findall(r"gpu:([A-Za-z_][\w.-]*):\d", offered))
    asked = {"gpu_partition": profile.gpu_partition, "cpu_partition": profile.cpu_partition}
    found = [_unknown(field, name, gres) for field, name in asked.items() if name not in gres]
    gpu = profile.partition(gpu=True).gpu
    known = gres.get(profile.gpu_partition)
    if gpu and gpu.gres and known is not None and gpu.gres not in known:
        found.append(_unknown(f"GPU name in {profile.gpu_partition}", gpu.gres, known))
    return found


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    there = f"It knows: {', '.join(names) or '(none)'}.{nearest(name, names)}"
    return f"{what}: Slurm does not know {name!r} for you here. {there} Put the right one into cluster.yaml"
