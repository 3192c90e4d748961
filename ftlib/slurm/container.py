"""Which image a site's stages run in, and the command that starts a task inside it. Apptainer itself is not asked."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ftlib.errors import InputError
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile, Container

LOCKS = ("login.lock", "train.lock", "deepspeed.lock", "torch.txt")
DEFINITION = ("train.def", "image_test.py")
SCRIPT = "slurm_templates/container.sh"


def _digest(env: Path, names: tuple[str, ...], *more: str) -> str:
    digest = hashlib.sha256()
    for content in [*((env / name).read_bytes() for name in names), *(text.encode() for text in more)]:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def lock(env: Path) -> str:
    """The digest of all that is installed: what `env/*.lock` and torch.txt say."""
    return _digest(env, LOCKS)


def image(profile: ClusterProfile, checkout: Path) -> dict[str, str] | None:
    """Path and lock of the image of this profile's stages, whether it is there or not; None where it uses none."""
    section = profile.container
    if section is None:
        return None
    env = checkout / "env"
    if not env.is_dir():
        raise InputError(f"{env} is not there: the checkout has moved, and images are made from it. Submit again there")
    if section.image:
        path = Path(profile.filled(section.image)).expanduser()
    else:
        folder = checkout / profile.filled(section.images) if section.images else profile.cache_dir(checkout) / "images"
        path = folder / f"train-{_digest(env, LOCKS + DEFINITION, section.base or '')}.sif"
    return {"path": str(path), "lock": lock(env)}


def problems(profile: ClusterProfile, image: dict[str, str]) -> list[str]:
    """What can be seen from here, before anything is queued, that would end each job in its first seconds."""
    section, found = profile.container, []
    assert section is not None
    where, path = f"cluster {profile.name}: container", Path(image["path"])
    have = shutil.which(section.command)
    if section.module is None and have is None:
        found.append(
            f"{where}.command: there is no {section.command!r} here. Name its module or path (container.module, "
            'container.command), or run without the image: SET="cluster.container=null"'
        )
    if section.image and not path.exists():
        found.append(f"{where}.image: {path} does not exist. Name another, or leave it out: make image builds one")
    for bind in section.binds:
        if not Path(profile.filled(bind)).exists():
            found.append(f"{where}.binds: {profile.filled(bind)} does not exist. Mend its name, or leave it out")
    if have and path.exists():
        done = subprocess.run([have, "inspect", "--labels", str(path)], capture_output=True, text=True, check=False)
        labels = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
        if done.returncode:
            words = " ".join(done.stderr.strip().splitlines()[-1:])
            found.append(f"{where}.image: {path} cannot be read ({words}). Remove it; make image builds it anew")
        elif labels.get("org.ftlib.lock") != image["lock"]:
            found.append(
                f"{where}.image: {path} holds the packages of lock {labels.get('org.ftlib.lock', 'unknown')}, this "
                f"checkout wants {image['lock']}. Leave container.image out (make image builds the right one)"
            )
    return found


def worker(profile: ClusterProfile, plan: RunPlan, stage: str, *provenance: dict[str, Any]) -> str:
    """The shell words before `-m …` that start a stage's Python: the host's, or the one inside the image.

    provenance: of the run, or of every run of an array.
    """
    section, made = profile.container, image(profile, Path(provenance[0]["checkout"]))
    if section is None or made is None:
        return shlex.quote(profile.python or sys.executable)
    # No --sharens for the ranks of a node: with it a signal ends Apptainer's own process and never reaches the worker.
    options = ["--nv"] if plan.stages[stage].device == "cuda" else []
    words = ["bash", SCRIPT, section.command, made["path"], made["lock"], *options]
    return shlex.join([*words, *_folders(profile, section, *provenance), "--", "python"])


def _folders(profile: ClusterProfile, section: Container, *provenance: dict[str, Any]) -> list[str]:
    """What runs read beside their own folders and the caches, each once; what lies in another of them is left out."""
    said = {one[key] for one in provenance for key in ("checkout", "init_adapter", "data_path") if one.get(key)}
    said |= {model for one in provenance if (model := str(one.get("model_path", ""))).startswith("/")}
    said |= {profile.filled(bind) for bind in section.binds}
    chosen: list[Path] = []
    for path in sorted(map(Path, said), key=lambda path: (len(path.parts), path)):
        if not any(path.is_relative_to(other) for other in chosen):
            chosen.append(path)
    return [str(path) for path in chosen]
