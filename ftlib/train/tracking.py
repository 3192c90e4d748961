"""Weights & Biases beside metrics.jsonl. Whatever goes wrong here is said once and never stops a training."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from ftlib.rundir import RunDir
from ftlib.spec import TrackingSpec

# A warned process has little time, and its outcome is still to be written.
FINISH_S = 20


class Tracking:
    """One wandb run per training run, the same id in every life; inside the run folder. Rank 0 only.
    It works in a thread of its own that begins with the first values: neither start nor network is waited for."""

    def __init__(self, run: RunDir, tracking: TrackingSpec) -> None:
        self._wish, self._spec, self._run = run, tracking, None  # type: tuple[RunDir, TrackingSpec, Any]
        self._thread: ThreadPoolExecutor | None = None
        self._off = tracking.mode == "disabled"

    def log(self, step: int, **values: float) -> None:
        """Values of one optimizer step; `step` is the run's, not the life's."""
        if self._off:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
            self._thread.submit(self._start)
        self._thread.submit(self._guarded, lambda: self._run.log(values, step=step))

    def finish(self) -> None:
        """Flush to disk; without it wandb loses what lies in its blocks."""
        if self._thread is None:
            return
        last = self._thread.submit(self._guarded, lambda: self._run.finish())
        if wait([last], timeout=FINISH_S).not_done:
            print("wandb: still busy; its last rows may be missing, metrics.jsonl has every step", flush=True)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread, self._off = None, True

    def _start(self) -> None:
        # wandb's own process inherits the blocked signals: Slurm signals every process of a step, and without
        # this a warning that we survive would kill it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
        for mode in dict.fromkeys((self._spec.mode, "offline")):
            try:
                self._run = self._init(mode)
                return
            except Exception as error:
                then = "going on offline; 'wandb sync' sends it later" if mode == "online" else "metrics.jsonl has all"
                print(f"wandb {mode}: {error}; {then}", flush=True)

    def _init(self, mode: str) -> Any:
        import wandb

        run, tracking = self._wish, self._spec
        return wandb.init(
            mode=mode, project=tracking.project, entity=tracking.entity, id=run.name, name=run.name,
            group=run.provenance().get("sweep"), resume="allow", dir=str(run.path),
            config=run.spec().model_dump(mode="json"),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_save_requirements=False,
                init_timeout=30, x_disable_stats=mode == "offline"))

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            if self._run is not None:
                call()
        except Exception as error:
            self._run = None
            print(f"wandb: {error}; going on without it, metrics.jsonl has every step", flush=True)
