"""13B within 32 GB? The peak at two settings beside the plan's figure, and what a save costs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.results import Recorder
from benchmarks.gpu_check.training import Large, Setting, measure

CODELLAMA = Large(recipe="codellama-13b", model="codellama/CodeLlama-13b-hf")
SETTINGS = (
    Setting(name="13B as in its recipe", settings=""),
    Setting(name="13B, one micro-batch of 8 rows", settings="train.micro_batch=8"),
)
GOAL_GIB = 32
SECONDS_A_SETTING = 25


def run(recorder: Recorder) -> None:
    """Both settings, as far as the time goes."""
    device = torch.device(recorder.device)
    for setting in SETTINGS:
        recorder.check(
            setting.name, lambda setting=setting: measured(setting, device, dry=recorder.dry), correctness=False,
            needs_s=0 if recorder.dry else SECONDS_A_SETTING)


def measured(setting: Setting, device: torch.device, *, dry: bool) -> dict[str, Any]:
    """The figures of `setting`, with whether the goal for 13B models was met."""
    values = measure(CODELLAMA, setting, device=device, dry=dry)
    peak = values["GPU peak GiB"]
    return values | {f"within {GOAL_GIB} GiB": None if peak is None else peak <= GOAL_GIB}
