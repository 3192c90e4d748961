"""What a login node can see of a site's faults before anything is queued: folders, home's quota, modules, names."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from ftlib.errors import InputError
from ftlib.profile import ClusterProfile
from ftlib.slurm import site
from jobs import image
from jobs import wish as wishes

# Some room for what other programs keep in a home folder; a full one breaks logins.
HOME_FULL = 0.97


def require(profile: ClusterProfile, cache: Path) -> None:
    """InputError with every fault that can be seen from here, each with its mend."""
    found = [missing] if (missing := profile.missing_account()) else []
    found += misplaced(profile, cache) + _full_home(profile) + _modules(profile)
    if profile.scheduler and not missing:
        found += [f"cluster {profile.name}: {words}" for words in site.problems(profile)]
    if found:
        raise InputError(found)
    image.ready(profile)


def misplaced(profile: ClusterProfile, cache: Path) -> list[str]:
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
        counted = (
            subprocess.run(["quota", "-w"], capture_output=True, text=True, timeout=30)
            if shutil.which("quota")
            else None
        )
        for row in (line.split() for line in (counted.stdout if counted else "").splitlines()):
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
