"""`image`: build the image that stages run in, once for each content of locks and definition.

Wheels are fetched first, by this Python's pip with its own settings, so that the build itself needs no package index.
What was fetched stays until the image is there: a killed build goes on with it. The image gets its name last.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from submitit.slurm.slurm import SlurmExecutor

from ftlib import atomic, recipe, state
from ftlib.errors import DONE, FtError, InputError
from ftlib.profile import ClusterProfile
from ftlib.runs import comments
from ftlib.slurm import batch, client, container, retry
from ftlib.spec import file_digest
from jobs import logs
from jobs import wish as wishes

BUILD_MIN = 120
BUILD_MEM_GIB = 16
# Unpacked packages and the image itself, as multiples of the wheels; measured on the CPU wheels.
UNPACKED, PACKED = 5, 1.5
# The base, a compiler and what goes with them.
BASE_BYTES = 2 * 2**30
WHEELS_BYTES = 2**29


def image(options: argparse.Namespace) -> int:
    """Build the image of a cluster's profile, here or in a job, and wait for it; nothing to do where it is there."""
    _, changes = recipe.parse_set(options.set)
    profile = wishes.load_profile(options.cluster, changes)
    if profile.container is None:
        raise InputError(
            f"cluster {profile.name}: container is not set, so its stages run in the virtual environment. To use an "
            "image put 'container: {}' into cluster.yaml, or say SET=\"cluster.container={}\""
        )
    wanted, there = ready(profile)
    if there:
        print(f"The image of these locks is there: {wanted['path']}")
    elif job := job_before(profile, wishes.CHECKOUT):
        target = Path(wanted["path"])
        log = target.parent / "slurm" / f"{job}_0_log.out"
        print(f"Job {job} builds the image; its log is {log}. Ctrl-C leaves it at work.", flush=True)
        logs.follow(job, log, profile, target.exists)
        if not target.exists():
            words = f"job {job} ended without an image; its words are above ({log})"
            raise FtError(f"{words}. make image goes on from there")
    return DONE


def ready(profile: ClusterProfile) -> tuple[dict[str, str], bool]:
    """Before anything is queued: see that the image can be used, and build it where the profile builds it here.

    Returns the image and whether it was there. InputError with all that would end each job in its first seconds.
    """
    image = container.image(profile, wishes.CHECKOUT)
    if image is None:
        return {}, False
    if problems := container.problems(profile, image):
        raise InputError(problems)
    there = Path(image["path"]).exists()
    by_job = profile.scheduler is not None and profile.container is not None and profile.container.build == "job"
    if not there and not by_job:
        build(profile, wishes.CHECKOUT, image)
    return image, there


def job_before(profile: ClusterProfile, checkout: Path, *, patience_s: float = retry.SUBMIT_S) -> str | None:
    """The job that builds the image, queued now or found; None where the image is there, or none is used.

    patience_s: how long a busy controller is asked for it.
    """
    image = container.image(profile, checkout)
    if image is None or Path(image["path"]).exists() or (profile.container and profile.container.image):
        return None  # a site's own image that is gone is not ours to build: the job says so
    assert profile.scheduler is not None
    client.use(profile.scheduler.slurm_conf)
    target = Path(image["path"])
    comment = comments.shared("image", target.name)
    of_image = [job for job in client.jobs() if job.comment == comment]
    for job in of_image:
        if state.SLURM_STATES.get(job.state) in state.ACTIVE:
            return job.id
    made = SlurmExecutor(target.parent / "slurm", python=shlex.quote(profile.python or sys.executable))
    setup = batch.enter(profile, {"PYTHONNOUSERSITE": "1"}, checkout)
    words = batch.small_parameters(
        profile, name="ftlib.image", setup=setup, comment=comment, time_min=BUILD_MIN, mem_gib=BUILD_MEM_GIB, cpus=4
    )
    made.update_parameters(**words)

    def sbatch() -> str:
        return str(made.submit(build, profile, checkout, image).job_id)

    before = [job.id for job in of_image]
    return retry.submit(sbatch, "the image's build", comment, patience_s=patience_s, before=before)


def build(profile: ClusterProfile, checkout: Path, image: dict[str, str]) -> None:
    """Build the image here, with progress. Killed at any moment, it leaves nothing that is taken for whole.

    FtError with Apptainer's or pip's last words; InputError without room, or where the checkout has changed meanwhile.
    """
    target, env, begun = Path(image["path"]), checkout / "env", time.monotonic()
    assert profile.container is not None
    if container.image(profile, checkout) != image:
        raise InputError(f"{env} has changed since the image {target.name} was asked for. Submit again")
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.require_space(target.parent, WHEELS_BYTES, "the image's packages")
    print(f"image: {target}", flush=True)
    wheels = target.parent / f"wheels-{image['lock']}"
    _fetch(env, wheels)
    size = sum(path.stat().st_size for path in wheels.iterdir())
    atomic.require_space(target.parent, int(size * PACKED) + BASE_BYTES, "the image")
    with _room(int(size * (UNPACKED + PACKED)) + BASE_BYTES, target.parent) as scratch:
        unfinished = atomic.temporary_beside(target)
        try:
            _apptainer(profile, env, image, wheels, scratch, unfinished)
            digest = file_digest(unfinished)
            atomic.write_text(target.with_name(f"{target.name}.sha256"), f"{digest}  {target.name}\n")
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    shutil.rmtree(wheels, ignore_errors=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took, cpu, mib = time.monotonic() - begun, used.ru_utime + used.ru_stime, target.stat().st_size / 2**20
    words = f"{took:.0f} s ({cpu:.0f} s of processor), {mib:,.0f} MiB, sha256 {digest[:16]}"
    print(f"image: ready after {words}", flush=True)


def _fetch(env: Path, wheels: Path) -> None:
    """Download all locked packages for the image's Python, whatever this one is; what is there already stays."""
    base = re.search(r"FROM=python:3\.(\d+)", (env / "train.def").read_text(encoding="utf-8"))
    assert base, "train.def names its Python"
    machine, minor = platform.machine(), base[1]
    platforms = [f"manylinux_2_{glibc}" for glibc in range(36, 4, -1)] + ["manylinux2014", "manylinux2010", "linux"]
    alike = [f"--python-version=3.{minor}", "--implementation=cp", "--only-binary=:all:", f"--abi=cp3{minor}"]
    alike += ["--abi=abi3", "--abi=none", *(f"--platform={name}_{machine}" for name in platforms)]
    for lock in container.LOCKS:
        print(f"image: fetching {lock}", flush=True)
        words = [] if lock == "torch.txt" else ["--no-deps", "--require-hashes"]
        words += [] if lock == "deepspeed.lock" else alike  # it comes as source alone
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--progress-bar=off"]
        done = subprocess.run(
            [*pip, *words, "--requirement", env / lock, "--dest", wheels], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise FtError(
                f"pip could not fetch {lock}: {_last_words(done.stderr)}. Check the network and pip's settings "
                f"({sys.executable} -m pip config list); what was fetched stays, and make image goes on from there"
            )


def _room(need: int, beside: Path) -> tempfile.TemporaryDirectory[str]:
    """A scratch folder: on the node's own disk where there is room, for many small files are slow elsewhere."""
    for place in (os.environ.get("TMPDIR"), "/tmp"):
        if place and Path(place).is_dir() and shutil.disk_usage(place).free > need:
            return tempfile.TemporaryDirectory(prefix="ftlib-image-", dir=place)
    atomic.require_space(beside, need, "building the image")
    return tempfile.TemporaryDirectory(prefix=atomic.TEMPORARY, dir=beside)


def _apptainer(
    profile: ClusterProfile, env: Path, image: dict[str, str], wheels: Path, scratch: str, target: Path
) -> None:
    assert profile.container is not None
    said = {"LOCK": image["lock"], "COMMIT": str(wishes.code_version()["commit"])}
    if base := profile.container.base:
        bootstrap, _, name = base.rpartition("://")
        said |= {"BOOTSTRAP": bootstrap or "localimage", "FROM": name}
    arguments = [word for key, value in said.items() for word in ("--build-arg", f"{key}={value}")]
    source = str(wheels).replace('"', '""')
    command, module = profile.container.command, profile.container.module
    load = ["bash", "-c", f'module load {shlex.quote(module)} && exec "$@"', "bash"] if module else []
    words = [*([] if shutil.which(command) else load), command, "--nocolor", "build"]
    words += ["--mount", f'type=bind,"source={source}",destination=/mnt']
    log = target.parent / "build.log"
    child = subprocess.Popen(
        [*words, *arguments, str(target), "train.def"], cwd=env,
        env={**os.environ, "APPTAINER_TMPDIR": scratch, "APPTAINER_CACHEDIR": f"{scratch}/cache"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    with log.open("w", encoding="utf-8", buffering=1) as file, child:
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            if line.startswith(("image: ", "image test: ", "INFO:    ")):
                print(line.replace("INFO:    ", "image: "), end="", flush=True)
    if child.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise FtError(
            f"the image could not be built: {_last_words(text)}. All of its words: {log}. What was fetched stays, and "
            "make image goes on from there"
        )


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"ERROR|FATAL|.*[Ee]rror:|.*No space left", line)]
    return " / ".join((telling or lines)[-3:]) or "it said nothing"
