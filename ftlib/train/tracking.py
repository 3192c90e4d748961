"""Weights & Biases beside metrics.jsonl. Whatever goes wrong here is said once and never stops a training."""

from __future__ import annotations

import signal
from typing import Any

from ftlib.rundir import RunDir
from ftlib.spec import TrackingSpec


class Tracking:
    """One wandb run per training run, the same id in every life; inside the run folder. Rank 0 only."""

    def __init__(self, run: RunDir, tracking: TrackingSpec) -> None:
        self._run: Any = None
        if tracking.mode == "disabled":
            return
        # wandb's own process inherits the blocked signals: Slurm signals every process of a step, and without
        # this a warning that we survive would kill it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
        try:
            self._run = self._init(run, tracking, tracking.mode)
        except Exception as error:
            print(f"wandb {tracking.mode}: {error}", flush=True)
            if tracking.mode == "online":
                print("wandb: going on offline; 'wandb sync' sends it later", flush=True)
                self._guarded(lambda: setattr(self, "_run", self._init(run, tracking, "offline")))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @staticmethod
    def _init(run: RunDir, tracking: TrackingSpec, mode: str) -> Any:
        import wandb

        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=tracking.project,
            entity=tracking.entity,
            id=run.name,
            name=run.name,
            resume="allow",
            dir=str(run.path),
            config=run.spec().model_dump(mode="json"),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_save_requirements=False,
                init_timeout=30,
                x_disable_stats=mode == "offline",
            ),
        )

    def log(self, step: int, **values: float) -> None:
        """Values of one optimizer step; `step` is the run's, not the life's."""
        if self._run is not None:
            self._guarded(lambda: self._run.log(values, step=step))

    def finish(self) -> None:
        """Flush to disk; without it wandb loses what lies in its blocks."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish())
            self._run = None

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            self._run = None
            print(f"wandb: {error}; going on without it, metrics.jsonl has every step", flush=True)
