"""Where the time of a 7B step goes: the recipe as it is, then one remedy after another, each on top of the one before.

The recipe is llama2-7b with eight rows of 1,024 tokens a step. Every row stands beside the plan's memory figure. From
`dropout 0` on all settings compute the same model, so the first step's loss has to stay what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu_check.results import Recorder
from benchmarks.gpu_check.training import Large, Setting, measure

LLAMA = Large(recipe="llama2-7b", model="meta-llama/Llama-2-7b-hf")
BATCH = "train.micro_batch=8 train.global_batch=8"
NO_DROPOUT = f"{BATCH} method.dropout=0"
FUSED = f"{NO_DROPOUT} optim.name=adamw_torch_fused"
SETTINGS = (
    Setting(name="7B padded to the longest of 8", settings=BATCH, packed=False),
    Setting(name="7B today", settings=BATCH),
    Setting(name="7B today, deterministic", settings=f"{BATCH} train.deterministic=true"),
    Setting(name="7B dropout 0", settings=NO_DROPOUT),
    Setting(name="7B + fused AdamW", settings=FUSED),
    Setting(name="7B + Liger", settings=FUSED, liger=True),
    Setting(name="7B + varlen", settings=FUSED, liger=True, varlen=True),
    Setting(name="7B + recompute every 2nd layer", settings=FUSED, liger=True, varlen=True, recompute_every=2),
    Setting(name="7B + recompute every 4th layer", settings=FUSED, liger=True, varlen=True, recompute_every=4),
    Setting(name="7B + recompute nothing", settings=f"{FUSED} train.gradient_checkpointing=false", liger=True,
            varlen=True),
    Setting(name="7B fastest, deterministic", settings=f"{FUSED} train.deterministic=true", liger=True, varlen=True),
)
# Which of its fields a setting tries first.
ADDS = {"7B + Liger": "liger", "7B + varlen": "varlen"}
SECONDS_A_SETTING = 25
PROFILED = "7B today, where the time goes"
TOP = 15


def run(recorder: Recorder) -> None:
    """All settings, as far as the time goes; the profile comes after the two that runs have today."""
    device = torch.device(recorder.device)
    needs_s = 0 if recorder.dry else SECONDS_A_SETTING
    expected_loss: float | None = None
    missing: dict[str, Any] = {}
    for listed in SETTINGS:
        setting = dataclasses.replace(listed, **missing)
        values = recorder.check(
            setting.name,
            lambda setting=setting, expected=expected_loss: measure(
                LLAMA, setting, device=device, dry=recorder.dry, expected_loss=expected),
            correctness=False, needs_s=needs_s)
        # A remedy that cannot be had here is left out, and the next is measured without it.
        if values is None and setting.name in ADDS:
            missing[ADDS[setting.name]] = False
        if setting.name == "7B dropout 0" and values:
            expected_loss = values["first loss"]
        if setting.name == "7B today":
            recorder.check(
                PROFILED, lambda setting=setting: profiled(setting, device, dry=recorder.dry), correctness=False,
                needs_s=needs_s)


def profiled(setting: Setting, device: torch.device, *, dry: bool) -> dict[str, Any]:
    """The kernels that took the most time in a training of `setting`, with their share of all kernels' time."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profilers: list[Any] = []

    @contextmanager
    def watched() -> Iterator[None]:
        with profile(activities=activities, acc_events=True) as profiler:
            yield
        profilers.append(profiler)

    measure(LLAMA, setting, device=device, dry=dry, around=watched)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = [event for event in profilers[0].key_averages() if getattr(event, time_of) > 0]
    if on_gpu:
        # Operators are listed with the time of the kernels that they started; only the kernels count.
        averages = [event for event in averages if str(event.device_type).endswith("CUDA")]
    whole = sum(getattr(event, time_of) for event in averages)
    averages.sort(key=lambda event: getattr(event, time_of), reverse=True)
    top = [{"kernel": event.key[:100], "share": round(getattr(event, time_of) / whole, 4), "calls": event.count}
           for event in averages[:TOP]]  # fmt: skip
    first = "; ".join(f"{row['share']:.0%} {row['kernel'][:40]}" for row in top[:5])
    return {"seconds in kernels": round(whole / 1e6, 2), "most": first, "top": top}
