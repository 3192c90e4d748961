"""What a stage's job says to sbatch and to its shell, as submitit's parameters."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib import hubapi, modelfiles
from ftlib.errors import InputError
from ftlib.plan.plan import RunPlan, StagePlan
from ftlib.profile import ClusterProfile, Partition, control_character

# It needs seconds, but it waits for a busy controller, and for a submit that is at work (retry.py, ftlib/claim.py).
GUARD_MIN = 30
TEMPLATES = "slurm_templates"
# sbatch hands the login shell's whole environment to the job. These of it would put other libraries in front of the
# locked ones, or (SLURM_EXPORT_ENV, which sbatch sets under SBATCH_EXPORT=NONE) have srun start the tasks without any
# variable at all. PYTHONPATH and the like are set below.
NOT_INHERITED = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "SLURM_EXPORT_ENV")


def environment(profile: ClusterProfile, plan: RunPlan, stage: str, *, run: Path | None, cache: Path) -> dict[str, str]:
    """Every variable that a stage's processes rely on, said on purpose; `run`: None where the shell finds it."""
    partition = profile.partition(gpu=plan.stages[stage].gpus_per_node > 0)
    threads = str(plan.threads)
    said = {"FT_RUN": str(run)} if run else {}
    said |= {
        "FT_STAGE": stage, "FT_PYTHON": profile.python or sys.executable,
        "FT_REQUEUE": "1" if profile.scheduler and profile.scheduler.requeue else "0",
        # Caches fill small home folders.
        "HF_HOME": str(modelfiles.hf_home(cache)),
        "XDG_CACHE_HOME": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        # Where W&B keeps its settings (WANDB_CONFIG_DIR) stays the person's: their login may be there.
        "WANDB_CACHE_DIR": str(cache / "wandb"), "WANDB_DATA_DIR": str(cache / "wandb-data"),
        "WANDB_ARTIFACT_DIR": str(cache / "wandb-artifacts"),
        # ~/.local would leak into the locked environment.
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": "",
        # Another thread count sums in another order.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        # Threads that spin while they wait starve each other where jobs share cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true",
    }  # fmt: skip
    if profile.scheduler and profile.scheduler.slurm_conf:
        said["SLURM_CONF"] = profile.scheduler.slurm_conf
    device = plan.stages[stage].device
    if device == "cpu":
        said["CUDA_VISIBLE_DEVICES"] = ""
        said["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for one, and warn
    if plan.deterministic and device == "cuda":
        said["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    token = hubapi.token_file()
    if token.is_file() and token != Path(said["HF_HOME"]) / "token":
        # A login's token stays where it is though HF_HOME moves; jobs get its path, never its value.
        said["HF_TOKEN_PATH"] = str(token)
    if stage != "prepare" or not profile.compute_internet:
        # Prepare fetches what is needed; a job that may hold a GPU never waits for a download.
        said["HF_HUB_OFFLINE"] = "1"
    said |= {**profile.environment, **partition.environment}
    if profile.container:
        said["FT_PASS"] = " ".join(said)  # the image's wall lets nothing else through
    return said


def request(profile: ClusterProfile, plan: RunPlan, stages: Sequence[str]) -> StagePlan:
    """What the job that runs `stages` asks for, its time limit cut to what the partition allows."""
    asked = plan.request(stages)
    most = profile.partition(gpu=asked.gpus_per_node > 0).max_time_min
    return asked.model_copy(update={"time_min": min(asked.time_min, most)})


def parameters(
    profile: ClusterProfile, asked: StagePlan, *, name: str, setup: list[str], comment: str, dependency: str | None,
    shared: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """submitit's parameters for a job that runs stages; `setup`: its shell lines before srun. `shared`: more than one
    stage, so that the lines from the prologue to the epilogue are a loop's, which `setup` has begun."""
    partition = profile.partition(gpu=asked.gpus_per_node > 0)
    extra: dict[str, Any] = {"mem": f"{asked.mem_gib}G"}
    extra["requeue" if profile.scheduler and profile.scheduler.requeue else "no-requeue"] = True
    if asked.gpus_per_node and partition.gpu:
        kind = f"{partition.gpu.gres}:" if partition.gpu.gres else ""
        by_gres = partition.ask_gpus_by == "gres"
        extra["gres" if by_gres else "gpus-per-node"] = f"{'gpu:' if by_gres else ''}{kind}{asked.gpus_per_node}"
    return _job(
        profile, partition, extra, asked.qos, job_name=name, setup=setup, comment=comment, dependency=dependency,
        partition=asked.partition, time=asked.time_min, nodes=asked.nodes, ntasks_per_node=asked.tasks_per_node,
        cpus_per_task=asked.cpus_per_task, exclude=profile.exclude,
        mail_user=profile.mail_user, mail_type="END,FAIL" if profile.mail_user else None,
        signal_delay_s=min(asked.warning_s, asked.time_min * 60 // 4),
        teardown=[f". {TEMPLATES}/epilogue.sh", *(["done"] if shared else [])],
        # A rank that crashes must not leave the others hanging; srun of 22.05 does not inherit cpus-per-task.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus_per_task}", "--open-mode=append"],
    )  # fmt: skip


def small_parameters(
    profile: ClusterProfile, *, name: str, setup: list[str], comment: str, dependency: str | None = None,
    time_min: int = GUARD_MIN, mem_gib: int = 1, cpus: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """submitit's parameters for a job on one CPU node that is no stage: a guard, a feeder, an image's build."""
    partition = profile.partition(gpu=False)
    extra = {"mem": f"{min(mem_gib, int(partition.mem_gib_per_node))}G", "requeue": True}
    return _job(
        profile, partition, extra, profile.resolved_qos(gpu=False), job_name=name, setup=setup, comment=comment,
        dependency=dependency, partition=partition.name, time=min(time_min, partition.max_time_min), nodes=1,
        ntasks_per_node=1, cpus_per_task=min(cpus, partition.cpus_per_node),
    )  # fmt: skip


def _job(
    profile: ClusterProfile, where: Partition, extra: dict[str, Any], qos: str | None, **said: Any
) -> dict[str, Any]:
    said |= {"account": profile.account, "qos": qos, "constraint": where.constraint}
    chosen = {key: value for key, value in said.items() if value is not None}
    extra = {"kill-on-invalid-dep": "yes", **extra}
    _check_options({**chosen, **extra})
    return {**chosen, "stderr_to_stdout": True, "wckey": None, "additional_parameters": extra}


def _check_options(options: dict[str, Any]) -> None:
    """InputError for a value that would begin another line among the #SBATCH ones. The profile is checked when it is
    read; a run's name, or a plan in a folder that was copied from elsewhere, is not."""
    problems = []
    for option, value in options.items():
        if isinstance(value, str) and (found := control_character(value)):
            problems.append(f"sbatch --{option.replace('_', '-')}: {value!r} has the character {found}; allowed: "
                            "printable characters on one line")  # fmt: skip
    if problems:
        raise InputError(problems)


def array(
    parameters: dict[str, Any], folder: Path, stage: str, indices: Sequence[int], cap: int | None
) -> dict[str, Any]:
    """`parameters` for an array whose tasks' runs are linked in `folder` by index; `cap`: most at once."""
    check_path(folder)
    spec = ranges(indices) + (f"%{min(cap, len(indices))}" if cap else "")
    log = f"{folder}/%a/slurm/{stage}/%A_%a"
    extra = {**parameters["additional_parameters"], "array": spec, "output": f"{log}_0_log.out"}
    # The last one counts.
    srun = [*parameters["srun_args"], "--output", f"{log}_%t_log.out"]
    return {**parameters, "additional_parameters": extra, "srun_args": srun}


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as Slurm says them: 0-3,7,9-10."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number - 1]
    ends = [i - 1 for i in starts[1:]] + [len(numbers) - 1]
    pairs = [(numbers[a], numbers[b]) for a, b in zip(starts, ends, strict=True)]
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in pairs)


def setup(
    profile: ClusterProfile, environment: dict[str, str], run: Path, stages: Sequence[str], time_min: int
) -> list[str]:
    """Shell lines before srun: variables, modules, the code as it was at submit time, and the prologue.

    stages: those that the job runs; time_min: its time limit.
    """
    check_path(run)
    return [*enter(profile, environment, run / "code"), *begin(stages, time_min)]


def array_setup(
    profile: ClusterProfile, environment: dict[str, str], runs: Path, folder: Path, stages: Sequence[str],
    time_min: int, *, prepared: bool,
) -> list[str]:  # fmt: skip
    """`setup` of an array's task, whose run is linked in `folder` by index; `prepared`: it looks for its dataset."""
    check_path(folder)
    link = f'"$(readlink {shlex.quote(str(folder))}/"$SLURM_ARRAY_TASK_ID")"'
    lines = [f'export FT_RUN={shlex.quote(str(runs))}/"$(basename {link})"', 'cd "$FT_RUN/code" || exit 1']
    if prepared:
        lines.append('[ -e "$FT_RUN/prepared.json" ] || { echo "ftlib: its dataset was not prepared"; exit 64; }')
    return [*_exports(environment), *lines, *_modules(profile), *begin(stages, time_min)]


def begin(stages: Sequence[str], time_min: int) -> list[str]:
    """The prologue of the only stage, or the head of a loop over the stages that share the job.

    A stage that is done is passed over, so that a job that was requeued in the second stage resumes there.
    """
    prologue = f". {TEMPLATES}/prologue.sh"
    if len(stages) == 1:
        return [prologue]
    return [
        f"FT_STAGES={shlex.quote(' '.join(stages))}",
        # When Slurm will end the job, for the case that the controller cannot be asked.
        f"export FT_ENDS=$(($(date +%s) + {60 * time_min}))",
        "for FT_STAGE in $FT_STAGES; do",
        """grep -qs '^0 ' "$FT_RUN/outcomes/$FT_STAGE"-[0-9]* && continue""",
        prologue,
    ]


def output(stages: Sequence[str]) -> str:
    """srun's options, as shell words, that put each rank's log into the stage's own folder where stages share a job."""
    if len(stages) == 1:
        return ""
    return '--output "$FT_RUN/slurm/$FT_STAGE/${FT_JOB}_%t_log.out" '  # srun obeys the last --output


def enter(profile: ClusterProfile, environment: dict[str, str], code: Path) -> list[str]:
    """Shell lines of every job: variables, into the snapshot of the code, and modules."""
    return [*_exports(environment), f"cd {shlex.quote(str(code))} || exit 1", *_modules(profile)]


def _modules(profile: ClusterProfile) -> list[str]:
    """The shell line, in the snapshot of the code, that loads the profile's modules; none where it names none."""
    names = [*profile.modules, profile.container.module if profile.container else None]
    quoted = [shlex.quote(name) for name in names if name]
    return [f". {TEMPLATES}/modules.sh {' '.join(quoted)}"] if quoted else []


def _exports(environment: dict[str, str]) -> list[str]:
    # Before anything of ours is set, so that what a profile or a module sets stays.
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return [f"unset {' '.join(NOT_INHERITED)}", *exports]


def check_path(path: Path) -> None:
    """InputError for a path that no #SBATCH line can hold."""
    for bad, name in (("\n", "a newline"), ("\r", "a carriage return"), ("%", "a percent sign")):
        if bad in str(path):
            words = f"the run folder's path holds {name}, which sbatch cannot be told: {str(path)!r}"
            raise InputError(f"{words}. Move the checkout")
