"""What a stage's job says to sbatch and to its shell, as submitit's parameters. Pure."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ftlib.errors import InputError
from ftlib.plan.plan import RunPlan
from ftlib.profile import ClusterProfile

# The warning before the time limit: long enough for one step and one save, and at most a quarter of the job.
SIGNAL_LEAD_S = 120
GUARD_MIN = 10
TEMPLATES = "slurm_templates"


def environment(
    profile: ClusterProfile, plan: RunPlan, stage: str, *, run: Path, cache: Path, hf: Path, python: str
) -> dict[str, str]:
    """Every variable that a stage's processes rely on, said on purpose. `python` is the host's, for the epilogue."""
    partition = profile.partition(gpu=plan.stages[stage].gpus_per_node > 0)
    threads = str(plan.threads)
    said = {
        "FT_RUN": str(run),
        "FT_STAGE": stage,
        "FT_PYTHON": python,
        "FT_REQUEUE": "1" if profile.scheduler and profile.scheduler.requeue else "0",
        # Caches fill small home folders.
        "HF_HOME": str(hf),
        "XDG_CACHE_HOME": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "WANDB_CACHE_DIR": str(cache / "wandb"),
        # ~/.local would leak into the locked environment.
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": "",
        # Another thread count sums in another order.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # Threads that spin while they wait starve each other where jobs share cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if profile.scheduler and profile.scheduler.slurm_conf:
        said["SLURM_CONF"] = profile.scheduler.slurm_conf
    if plan.device == "cpu":
        said["CUDA_VISIBLE_DEVICES"] = ""
        said["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for one, and warn
    if plan.deterministic and plan.device == "cuda":
        said["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if not profile.compute_internet:
        said["HF_HUB_OFFLINE"] = "1"
    return {**said, **profile.environment, **partition.environment}


def parameters(
    profile: ClusterProfile,
    plan: RunPlan,
    stage: str,
    *,
    run: Path,
    environment: dict[str, str],
    comment: str,
    after: str | None,
) -> dict[str, Any]:
    """submitit's parameters for one stage of the run folder `run`, to start when job `after` is completed."""
    check_path(run)
    asked = plan.stages[stage]
    partition = profile.partition(gpu=asked.gpus_per_node > 0)
    extra: dict[str, Any] = {"kill-on-invalid-dep": "yes", "mem": f"{asked.mem_gib}G"}
    extra["requeue" if profile.scheduler and profile.scheduler.requeue else "no-requeue"] = True
    if asked.gpus_per_node and partition.gpu:
        kind = f":{partition.gpu.gres}" if partition.gpu.gres else ""
        extra.update(
            {"gres": f"gpu{kind}:{asked.gpus_per_node}"}
            if partition.ask_gpus_by == "gres"
            else {"gpus-per-node": f"{kind[1:] + ':' if kind else ''}{asked.gpus_per_node}"}
        )
    chosen = {
        "account": profile.account,
        "qos": asked.qos,
        "constraint": partition.constraint,
        "exclude": profile.exclude,
        "mail_user": profile.mail_user,
        "mail_type": "END,FAIL" if profile.mail_user else None,
        "dependency": f"afterok:{after}" if after else None,
    }
    return {
        "job_name": f"{run.name}.{stage}",
        "partition": asked.partition,
        "time": asked.time_min,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "cpus_per_task": asked.cpus_per_task,
        "comment": comment,
        "signal_delay_s": min(SIGNAL_LEAD_S, asked.time_min * 60 // 4),
        "stderr_to_stdout": True,
        "wckey": None,
        **{key: value for key, value in chosen.items() if value is not None},
        "additional_parameters": extra,
        "setup": setup(profile, environment, run),
        "teardown": [f". {TEMPLATES}/epilogue.sh"],
        # A rank that crashes must not leave the others hanging; srun of 22.05 does not inherit cpus-per-task.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus_per_task}", "--open-mode=append"],
    }


def guard_parameters(
    profile: ClusterProfile, *, run: Path, environment: dict[str, str], comment: str, watched: list[str]
) -> dict[str, Any]:
    """submitit's parameters for the job of seconds that runs when one of the `watched` jobs ends badly."""
    partition = profile.partition(gpu=False)
    chosen = {"account": profile.account, "qos": profile.resolved_qos(gpu=False), "constraint": partition.constraint}
    return {
        "job_name": f"{run.name}.guard",
        "partition": partition.name,
        "time": GUARD_MIN,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "comment": comment,
        "stderr_to_stdout": True,
        "wckey": None,
        **{key: value for key, value in chosen.items() if value is not None},
        # Any of them; when all complete, the dependency can never be met and Slurm removes the guard.
        "dependency": "?".join(f"afternotok:{job}" for job in watched),
        "additional_parameters": {"kill-on-invalid-dep": "yes", "mem": "1G", "requeue": True},
        "setup": [*_exports(profile, environment), _enter(run)],
    }


def setup(profile: ClusterProfile, environment: dict[str, str], run: Path) -> list[str]:
    """Shell lines before srun: variables, modules, the code as it was at submit time, and the prologue."""
    return [*_exports(profile, environment), _enter(run), f". {TEMPLATES}/prologue.sh"]


def _exports(profile: ClusterProfile, environment: dict[str, str]) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return [*lines, *(f"module load {shlex.quote(module)}" for module in profile.modules)]


def _enter(run: Path) -> str:
    return f"cd {shlex.quote(str(run / 'code'))} || exit 1"


def check_path(path: Path) -> None:
    """InputError for a path that no #SBATCH line can hold."""
    for character, name in (("\n", "a newline"), ("\r", "a carriage return"), ("%", "a percent sign")):
        if character in str(path):
            raise InputError(
                f"the run folder's path holds {name}, which sbatch cannot be told: {str(path)!r}. Move the checkout"
            )
