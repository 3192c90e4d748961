"""The GPU watch, on a GPU that exists in this file only: a real one cannot be made idle on demand."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlib.errors import Interrupted
from ftlib.metrics import idle_gpu_hours
from ftlib.rundir import RunDir
from ftlib.runs import diagnosis, outcome, policy
from ftlib.stop import StopFlag
from ftlib.train.watch import GpuWatch, act_after_s


class Nvml:
    """Answers as pynvml does."""

    def __init__(self, *shares: int) -> None:
        self.shares, self.asked = list(shares), ""

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return "gpu"

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        return SimpleNamespace(gpu=self.shares.pop(0) if len(self.shares) > 1 else self.shares[0])

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        return SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 71_500


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def rows(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "gpu.jsonl").read_text().splitlines()]


def test_samples_become_rows(run: RunDir) -> None:
    nvml, stop = Nvml(90, 2, 97), StopFlag()
    with GpuWatch(run, 3, stop, uuid="abc", nvml=nvml, every_s=0.01):
        wait_for(lambda: (run.path / "gpu.jsonl").exists() and len(rows(run)) >= 3)
    found = rows(run)
    assert nvml.asked == "GPU-abc" and stop.cause is None
    assert [row["utilization"] for row in found[:3]] == [90, 2, 97]
    assert found[0]["life"] == 3 and found[0]["memory_gib"] == 3 and found[0]["power_w"] == 71.5
    assert idle_gpu_hours(run.path) == pytest.approx(5 / 3600)


def test_an_idle_gpu_stops_the_stage_and_a_busy_one_never(run: RunDir) -> None:
    limit = 0.002  # minutes: 90 ms
    stop = StopFlag()
    with GpuWatch(run, 1, stop, uuid="u", nvml=Nvml(0), every_s=0.01, limit_min=limit):
        wait_for(lambda: stop.cause)
    assert stop.cause == "idle GPU"
    busy = StopFlag()
    with GpuWatch(run, 1, busy, uuid="u", nvml=Nvml(*[0, 0, 80] * 99), every_s=0.01, limit_min=limit):
        time.sleep(0.4)
    assert busy.cause is None


def test_the_words_of_an_idle_stop_are_known_and_not_tried_again() -> None:
    found = diagnosis.cause_of(diagnosis.Evidence(outcome_code=75, outcome_message=str(Interrupted("idle GPU", 12))))
    assert found.cause == "idle GPU" and found.line == "interrupted (idle GPU), saved at step 12"
    assert not policy.decide([policy.Life("idle GPU", True)], micro_batch=1).requeue


def test_a_warning_keeps_its_own_cause(run: RunDir) -> None:
    stop = StopFlag()
    stop.cause = "preemption"
    with GpuWatch(run, 1, stop, uuid="u", nvml=Nvml(0), every_s=0.01, limit_min=0.001):
        time.sleep(0.2)
    assert stop.cause == "preemption"


@pytest.mark.parametrize(("stage", "saved"), [("train", ", saved at step 7"), ("evaluate", "")])
def test_a_process_that_hangs_is_ended_and_says_what_is_saved(run: RunDir, stage: str, saved: str) -> None:
    (run.checkpoints / "step-00000007").mkdir(parents=True)
    ended: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        ended.append(code)
        over.set()

    short = {"every_s": 0.01, "limit_min": 0.001, "hang_s": 0.05}
    with GpuWatch(run, 2, StopFlag(), uuid="u", stage=stage, nvml=Nvml(0), end=end, **short):  # type: ignore[arg-type]
        assert over.wait(10)
    assert ended == [75]
    words = outcome.read(run.outcomes, stage)[0].message
    assert words == f"interrupted (idle GPU){saved}; the process hung and was ended"
    assert rows(run)[0]["stage"] == stage
    assert diagnosis.from_outcome(75, words) == "idle GPU"


def test_without_nvml_it_says_so_and_no_more(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    class Missing:
        def nvmlInit(self) -> None:
            raise RuntimeError("NVML Shared Library Not Found")

    with GpuWatch(run, 1, StopFlag(), uuid="u", nvml=Missing(), limit_min=1):
        pass
    assert "GPU use is not watched: NVML Shared Library Not Found" in capsys.readouterr().out
    assert not (run.path / "gpu.jsonl").exists()


def test_it_acts_before_the_site_does() -> None:
    assert act_after_s(60) == 55 * 60 and act_after_s(8) == 6 * 60
