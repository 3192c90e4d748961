"""From spec and numerics to the Trainer's arguments, and a process that computes the same twice."""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ftlib.allocation import VISIBLE
from ftlib.errors import BadGpu, InputError
from ftlib.plan.numerics import Numerics
from ftlib.spec import RunSpec
from ftlib.train import kernels, ranks


def prepare_process(numerics: Numerics, stage: str, request: Mapping[str, Any]) -> torch.device:
    """Pin the threads, set the deterministic mode, and name the device of this rank of `stage`.

    request: what the stage's job was submitted with (StagePlan as data).
    InputError where there is no GPU for it, BadGpu where the node shows fewer than it should.
    """
    torch.set_num_threads(numerics.threads)
    # What our pinned libraries say of each other is of no use to a person who reads the log.
    for library in ("accelerate", "peft", "transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    for logger in ("accelerate.accelerator", "bitsandbytes"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    of_stage = numerics.stages[stage]
    on_gpu = of_stage.device == "cuda"
    if on_gpu:
        check_gpus(stage, request)
    kernels.choose(numerics.kernels, on_gpu=on_gpu, deterministic=of_stage.deterministic)
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def check_gpus(stage: str, request: Mapping[str, Any]) -> None:
    """InputError or BadGpu unless CUDA finds the GPUs that the job of `stage` was submitted with (StagePlan as data).
    What Slurm gave was checked when the stage began (ftlib.allocation)."""
    node, shown = os.uname().nodename, repr(os.environ.get(VISIBLE, "not set"))
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPUs alone"
        raise InputError(
            f"{stage}: the plan asks for a GPU, but torch {torch.__version__} ({built}) finds none on {node} "
            f"({VISIBLE}: {shown}). make env CLUSTER=… says whether driver, packages or the partition are at fault")
    if (count := torch.cuda.device_count()) < request["gpus_per_node"]:
        raise BadGpu(f"{stage}: node {node} shows {count} of its {request['gpus_per_node']} GPUs ({VISIBLE}: {shown})")


def training_arguments(
    spec: RunSpec, numerics: Numerics, total: int, folder: Path, *, universal: bool = False
) -> TrainingArguments:
    """The Trainer's arguments for `total` optimizer steps. With ZeRO 3, models loaded from now on are sharded.
    universal: the training begins from a checkpoint that was rewritten for this number of processes."""
    train, optim, world = spec.train, spec.optim, ranks.world_size()
    on_gpu = numerics.stages["train"].device == "cuda"
    micro, accumulation = numerics.micro_batch, numerics.accumulation
    if (rows := micro * accumulation * world) != train.global_batch:
        raise InputError(
            f"the run's micro_batch {micro} x accumulation {accumulation} x {world} processes is {rows} rows a step, "
            f"not train.global_batch {train.global_batch}")
    sharing = numerics.zero
    if sharing and universal:
        sharing = {**sharing, "checkpoint": {"load_universal": True}}
    arguments = TrainingArguments(
        deepspeed=sharing, output_dir=str(folder), max_steps=total, bf16=numerics.compute_dtype == "bfloat16",
        use_cpu=not on_gpu, seed=train.seed, data_seed=train.seed,
        per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
        learning_rate=optim.lr, optim=optim.name, weight_decay=optim.weight_decay, max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        warmup_steps=round(optim.warmup_share * total), activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        dataloader_pin_memory=on_gpu, remove_unused_columns=False,
        # Named for one process, it would look for the others.
        ddp_backend=None if world == 1 and not sharing else "nccl" if on_gpu else "gloo",
        # In each of two stages the other's parameters are unused.
        ddp_find_unused_parameters=spec.method.kind == "two-stage",
        # Saving, validating, logging and tracking are ours: in this order, at every step, and across lives.
        save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        logging_nan_inf_filter=False)
    if on_gpu and world == 1 and not sharing:
        # A Trainer that counts two GPUs spreads each batch over both: a doubled batch, in another order. The stage's
        # entry shows this process one; here it holds even where CUDA was looked at before. (Trainer does the same for
        # a model that lies on several GPUs.)
        _ = arguments.device  # counts them
        arguments._n_gpu = 1
    return arguments
