"""How well the GPU is used, sampled beside the work; a GPU that idles too long ends the stage. No torch.
The rows of gpu.jsonl are described in ftlib.metrics."""

import contextlib
import datetime
import importlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from ftlib import checkpoint
from ftlib.errors import RUN_AGAIN, Interrupted
from ftlib.metrics import GPU_EVERY_S, GPU_IDLE_BELOW
from ftlib.rundir import RunDir
from ftlib.runs import outcome
from ftlib.stop import StopFlag

CAUSE = "idle GPU"


def watched(run: RunDir, life: int, stop: StopFlag, stage: str) -> contextlib.AbstractContextManager[object]:
    """A context in which this rank's GPU is watched by the site's limit; nothing where the stage computes on none."""
    if run.numerics().stages[stage].device != "cuda":
        return contextlib.nullcontext()
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    limit = (run.provenance().get("profile") or {}).get("gpu_idle_limit_min")
    rank = int(os.environ.get("RANK", "0"))
    return GpuWatch(run, life, stop, uuid=uuid, stage=stage, rank=rank, limit_min=limit)


def act_after_s(limit_min: float) -> float:
    """After how long an idle stage is stopped: early enough before the site's limit to save in peace."""
    return 60 * (limit_min - min(5.0, limit_min / 4))


class GpuWatch:
    """Samples one GPU in a thread of its own; use as a context. Without NVML it only says so.
    Work that obeys no stop within `hang_s` hangs: the process is ended, with an outcome that names the last
    checkpoint."""

    def __init__(
        self, run: RunDir, life: int, stop: StopFlag, *, uuid: str, stage: str = "train", rank: int = 0,
        limit_min: float | None = None, nvml: Any = None, every_s: float = GPU_EVERY_S, hang_s: float = 120.0,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        """uuid: the GPU's, as torch tells it. nvml: the pynvml module, or one that answers like it."""
        self._run, self._life, self._stop, self._stage, self._rank = run, life, stop, stage, rank
        self._uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._act_after_s = act_after_s(limit_min) if limit_min else None
        self._nvml, self._every_s, self._hang_s, self._end = nvml, every_s, hang_s, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "GpuWatch":
        try:
            self._nvml = self._nvml or importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except Exception as error:  # NVMLError is a class of a module that may be missing
            if self._rank == 0:
                print(f"GPU use is not watched: {error} (the package nvidia-ml-py reads it)", flush=True)
            return self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _watch(self) -> None:
        name = "gpu.jsonl" if self._rank == 0 else f"gpu-{self._rank}.jsonl"
        busy_at, asked_at = time.monotonic(), None
        with (self._run.path / name).open("a", encoding="utf-8", buffering=1) as file:
            while not self._over.wait(self._every_s):
                try:
                    share = self._sample(file)
                except Exception as error:  # A GPU that falls off the bus shows elsewhere.
                    print(f"GPU use is no longer watched: {error}", flush=True)
                    return
                now = time.monotonic()
                if share >= GPU_IDLE_BELOW:
                    busy_at, asked_at = now, None
                elif self._act_after_s is None or now - busy_at < self._act_after_s:
                    continue
                elif asked_at is None:
                    asked_at, idle_min = now, (now - busy_at) / 60
                    words = f"the GPU has done nothing for {idle_min:.0f} min; this site ends such jobs: "
                    print(f"{words}saving and stopping", flush=True)
                    self._stop.cause = self._stop.cause or CAUSE
                elif now - asked_at > self._hang_s:
                    self._give_up()
                    return

    def _sample(self, file: TextIO) -> float:
        """Write one row; returns the utilisation in percent."""
        nvml = self._nvml
        share = float(nvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu)
        power = None
        with contextlib.suppress(Exception):  # not every GPU tells
            power = round(nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000, 1)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        memory = round(nvml.nvmlDeviceGetMemoryInfo(self._gpu).used / 2**30, 3)
        row = {"time": now, "stage": self._stage, "life": self._life, "utilization": share, "memory_gib": memory}
        file.write(json.dumps({**row, "power_w": power}) + "\n")
        return share

    def _give_up(self) -> None:
        """The work hangs and never looks at the flag."""
        kept = checkpoint.committed(self._run.checkpoints) if self._stage == "train" else []
        words = f"{Interrupted(CAUSE, checkpoint.step_of(kept[0]) if kept else None)}; the process hung and was ended"
        print(f"{self._stage}: {words}", flush=True)
        if self._rank == 0:
            outcome.write(self._run.outcomes, outcome.Outcome(self._stage, self._life, RUN_AGAIN, words))
        self._end(RUN_AGAIN)
