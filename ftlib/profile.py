"""ClusterProfile: what a site offers, plus what its user chose. No Slurm is asked here."""

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from ftlib.errors import InputError, unknown
from ftlib.recipe import names, override, read_yaml
from ftlib.spec import Model, validate


def control_character(text: str) -> str | None:
    """The first character of `text` that could end a line of a job's script or hide in it, as Python writes it (such as
    '\\n'); None where all are printable."""
    return next((repr(character) for character in text if not character.isprintable()), None)


class SiteModel(Model):
    """A part of a profile. Its text reaches #SBATCH lines, where a line break would begin another option, so that every
    text in it is one printable line."""

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        texts = [value]
        if isinstance(value, dict):
            texts = [*value.keys(), *value.values()]
        elif isinstance(value, tuple):
            texts = list(value)
        for text in texts:
            if isinstance(text, str) and (found := control_character(text)):
                raise ValueError(f"{text!r} has the character {found}; allowed: printable characters on one line")
        return value


def _shell_names(variables: dict[str, str]) -> dict[str, str]:
    """`variables`, each of whose names a shell takes as it stands; ValueError lists the others."""
    problems = []
    for name in variables:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            nearest = re.sub("[^A-Za-z0-9_]", "_", name)
            nearest = f"_{nearest}" if nearest[:1].isdigit() else nearest
            hint = f" Did you mean {nearest}?" if nearest else ""
            problems.append(f"{name!r} is no name of a variable; allowed: letters, digits and _, no digit first.{hint}")
        elif name.startswith("FT_"):
            problems.append(f"{name!r} is set for each job by ftlib itself; allowed: names that do not begin with FT_")
    if problems:
        raise ValueError(" ".join(problems))
    return variables


Variables = Annotated[dict[str, str], AfterValidator(_shell_names)]


class Gpu(SiteModel):
    """One GPU of a partition; figures from its data sheet."""

    type: str = Field(description="What people call it, such as a100")
    gres: str = Field("", description="Its GRES name in Slurm, such as a100 in gpu:a100:1")
    memory_gib: float = Field(gt=0, description="Memory of one GPU, in GiB")
    bf16_tflops: float | None = Field(None, gt=0, description="Dense bf16 peak, in TFLOP/s; no time estimate without")
    capability: float | None = Field(
        None, ge=1, description="Compute capability, such as 9.0; older GPUs are known by their name")
    simulated: bool = Field(False, description="A fake GPU of a test cluster: jobs compute on the CPU")


class Partition(SiteModel):
    """One partition and the shape of its nodes."""

    name: str = Field(description="Name of the partition")
    gpu: Gpu | None = Field(None, description="Its GPU; none for a CPU partition")
    gpus_per_node: int = Field(0, ge=0, description="GPUs a node")
    cpus_per_node: int = Field(ge=1, description="CPUs a node")
    mem_gib_per_node: float = Field(gt=0, description="Memory a job may use on a node, in GiB")
    max_time_min: int = Field(ge=1, description="Longest time limit, in minutes")
    ask_gpus_by: Literal["gres", "gpus-per-node"] = Field("gres", description="Which sbatch option asks for GPUs")
    constraint: str | None = Field(None, description="sbatch --constraint")
    environment: Variables = Field({}, description="Variables for jobs here, such as NCCL_SOCKET_IFNAME")


# Where nobody has counted yet.
KILL_EVERY_H = 24.0


class Scheduler(SiteModel):
    """How Slurm behaves here."""

    cluster_name: str = Field(description="ClusterName that scontrol show config reports")
    slurm_conf: str | None = Field(None, description="SLURM_CONF, where it is not the system's")
    account_required: bool = Field(False, description="Jobs without --account are refused")
    requeue: bool = Field(True, description="Jobs may be requeued")
    max_array_size: int = Field(1001, ge=2, description="MaxArraySize of slurm.conf: tasks of one array")
    max_jobs: int | None = Field(
        None, ge=5, description="Jobs you may have in the queue at once, array tasks counted; null: no limit")
    max_points: int = Field(10_000, ge=1, description="Most points of one sweep: each is a run folder")
    poll_interval_s: float = Field(30, ge=0, description="Least time between two questions to the scheduler")
    kill_every_h: float = Field(
        KILL_EVERY_H, gt=0, description="Hours a job runs here, on average, until it is killed without a warning")


class Storage(SiteModel):
    """Where things belong. Models, packages and runs fill a home folder with a small quota."""

    home_gib: float | None = Field(None, gt=0, description="Quota of a home folder, where it is too small for all that")
    work: str | None = Field(None, description="Folder for checkouts, packages and runs; {account} and {user}")
    quota_command: str | None = Field(
        None, description="Tells the group's quota of it as lfs quota does; {account} and {user}")


class Container(SiteModel):
    """How this site's stages run in an image (env/train.def)."""

    command: str = Field("apptainer", description="Apptainer's command, or its path")
    module: str | None = Field(None, description="module load that brings the command")
    image: str | None = Field(None, description="A ready image; default: the one that make image builds")
    images: str | None = Field(None, description="Folder of the built images; default: images/ in the cache")
    base: str | None = Field(
        None, description="What it is built on: docker://NAME:TAG, or a folder with Debian; default: env/train.def's")
    build: Literal["login", "job"] = Field("login", description="Built where you submit, or in a CPU job")
    binds: tuple[str, ...] = Field((), description="Folders shown inside beside the run's own, such as /blue")


class ClusterProfile(SiteModel):
    """A site and a user's choices in it; `scheduler` is null where there is no Slurm."""

    name: str = Field(description="Name of the profile")
    description: str = Field("", description="One line for people")
    account: str | None = Field(None, description="sbatch --account: the group that pays")
    qos: str | None = Field(None, description="sbatch --qos; {account} is replaced")
    cpu_qos: str | None = Field(None, description="QOS of CPU stages, where it differs; {account} is replaced")
    gpu_partition: str = Field(description="Partition of GPU stages")
    cpu_partition: str = Field(description="Partition of CPU stages")
    exclude: str | None = Field(None, description="sbatch --exclude: nodes to keep away from")
    mail_user: str | None = Field(None, description="Where Slurm sends mail when a job ends or fails")
    scheduler: Scheduler | None = Field(None, description="Slurm here; null: run on this machine, now")
    partitions: tuple[Partition, ...] = Field(min_length=1, description="What there is to ask for")
    cache: str = Field(".cache", description="Folder for caches, on storage every node sees; {account} and {user}")
    storage: Storage = Storage()
    modules: tuple[str, ...] = Field((), description="module load, in this order")
    environment: Variables = Field({}, description="Variables for every job")
    python: str | None = Field(None, description="Interpreter of the jobs; default: the one that submits")
    container: Container | None = Field(None, description="Run in an image; null: in the virtual environment")
    compute_internet: bool = Field(True, description="Compute nodes reach the internet")
    gpu_idle_limit_min: int | None = Field(
        None, ge=2, description="Minutes after which the site ends jobs whose GPU does nothing")

    def partition(self, *, gpu: bool) -> Partition:
        """The partition chosen for GPU or CPU stages."""
        wanted = self.gpu_partition if gpu else self.cpu_partition
        return next(p for p in self.partitions if p.name == wanted)

    def resolved_qos(self, *, gpu: bool) -> str | None:
        """The QOS of GPU or CPU stages, with the account filled in."""
        qos = self.qos if gpu else (self.cpu_qos or self.qos)
        if qos is None or ("{account}" in qos and self.account is None):
            return None
        return qos.format(account=self.account)

    def cache_dir(self, checkout: Path) -> Path:
        """Where caches go: absolute, `{account}` and `{user}` filled in; a relative one lies in the checkout."""
        return checkout / self.filled(self.cache)

    def work_dir(self) -> str | None:
        """The folder for checkouts, packages and runs, filled in."""
        return self.filled(self.storage.work) if self.storage.work else None

    def filled(self, text: str) -> str:
        """`text` with {account} and {user} filled in."""
        user = os.environ.get("USER") or getpass.getuser()
        return text.format(account=self.account or "{account}", user=user)

    def missing_account(self) -> str | None:
        """What to tell a person whose jobs would be refused for want of an account; None where all is well."""
        texts = (self.qos, self.cpu_qos, self.cache)
        needed = any(text and "{account}" in text for text in texts)
        needed = needed or bool(self.scheduler and self.scheduler.account_required)
        if self.account is not None or not needed:
            return None
        return (
            f"cluster {self.name}: account is missing and jobs here need one. Put 'account: <your group>' into "
            'cluster.yaml or say SET="cluster.account=<your group>"')


def load(folder: Path, name: str, changes: dict[str, Any], own: Path | None = None) -> ClusterProfile:
    """The profile `name`, the person's own file over it where that speaks of this cluster, `changes` over both.
    Raises InputError with every problem at once."""
    if name not in names(folder):
        raise InputError(unknown("CLUSTER", name, names(folder)))
    values: dict[str, Any] = {**read_yaml(folder / f"{name}.yaml"), "name": name}
    mine = read_yaml(own) if own and own.exists() else {}
    if mine.get("name", name) == name:
        values = override(values, {key: value for key, value in mine.items() if key != "name"})
    profile = validate(ClusterProfile, override(values, changes), f"cluster {name}")
    _check(profile)
    return profile


def changed(profile: ClusterProfile, changes: dict[str, Any]) -> ClusterProfile:
    """`profile` with each dotted field of `changes` put in, checked like one that is loaded.
    Raises InputError with every problem at once."""
    if not changes:
        return profile
    where = f"cluster {profile.name}"
    found = validate(ClusterProfile, override(profile.model_dump(mode="json"), changes), where)
    _check(found)
    return found


def measured_here(profile: ClusterProfile) -> ClusterProfile:
    """`profile` with this machine's CPUs, memory and GPUs in place of its partitions' figures."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = _gpus_here()
    measured = {"cpus_per_node": cpus, "mem_gib_per_node": memory_gib, "gpu": gpus[0] if gpus else None}
    measured["gpus_per_node"] = len(gpus)
    partitions = tuple(partition.model_copy(update=measured) for partition in profile.partitions)
    return profile.model_copy(update={"partitions": partitions})


def _gpus_here() -> list[Gpu]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if done.returncode == 0 and "," in line]
    return [Gpu(type=name.strip(), memory_gib=float(mib) / 1024) for name, mib in rows if mib.strip().isdigit()]


def own_choice(own: Path) -> str | None:
    """The cluster that a person's cluster.yaml names, if there is such a file."""
    name = read_yaml(own).get("name") if own.exists() else None
    return None if name is None else str(name)


def _check(profile: ClusterProfile) -> None:
    where, problems = f"cluster {profile.name}", []
    known = [p.name for p in profile.partitions]
    for field in ("gpu_partition", "cpu_partition"):
        if getattr(profile, field) not in known:
            problems.append(unknown(f"{where}: {field}", getattr(profile, field), known))
    work = profile.storage.work
    texts = {"qos": profile.qos, "cpu_qos": profile.cpu_qos, "cache": profile.cache, "storage.work": work,
             "storage.quota_command": profile.storage.quota_command}
    for field, text in texts.items():
        allowed = ("account",) if "qos" in field else ("account", "user")
        try:
            (text or "").format(**dict.fromkeys(allowed, ""))
        except KeyError as error:
            problems.append(unknown(f"{where}: {field}: placeholder", error.args[0], allowed))
        except (ValueError, IndexError, AttributeError) as error:
            problems.append(f"{where}: {field}: {error} in {text!r}")
    if problems:
        raise InputError(problems)
