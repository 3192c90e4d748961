"""A runs folder and a Slurm of shims, for tests of what is shown of runs: status, logs, why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.status import PER_ARRAY, make_runs
from ftlib.rundir import STAGES, RunDir
from jobs import cli, logs, look, runs

ARRAYS = [{stage: str(100 * (chunk + 1) + i) for i, stage in enumerate(STAGES)} for chunk in range(5)]
RUNNING = {"prepare": ("COMPLETED", "None"), "train": ("RUNNING", "None")}


class Site:
    """A runs folder, and a Slurm whose squeue and sacct say what the test has put in two files, and note each call."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.runs = place, place / "runs"
        (place / "bin").mkdir()
        for name in ("squeue", "sacct"):
            (place / name).touch()
            shim = place / "bin" / name
            shim.write_text(
                f'#!/bin/sh\necho "{name} $*" >>"{place}/calls"\n. "{place}/{name}.sh"\ncat "{place}/{name}"\n'
            )
            shim.chmod(0o755)
            (place / f"{name}.sh").touch()
        (place / "calls").touch()
        monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")
        for module in (look, logs, runs):
            monkeypatch.setattr(module, "RUNS", self.runs)

    def make(self, count: int = 1, **said: Any) -> list[RunDir]:
        names = make_runs(self.runs, count, ARRAYS, conf=self.place / "slurm.conf", **said)
        return [RunDir(self.runs / name) for name in names]

    def say(
        self, jobs: dict[str, tuple[str, str]], *, start: str = "N/A", comment: str = "ftlib x {stage} nonce-{stage}"
    ) -> None:
        """squeue's answer: job id -> (state, reason)."""
        stages = {array: stage for arrays in ARRAYS for stage, array in arrays.items()}
        rows = []
        for job, told in jobs.items():
            words = comment.format(stage=stages.get(job.partition("_")[0], "train"))
            rows.append("\x1f".join([job, *told, words, start]) + "\n")
        (self.place / "squeue").write_text("".join(rows))

    def calls(self) -> list[str]:
        """The commands since the last time."""
        found = (self.place / "calls").read_text().splitlines()
        (self.place / "calls").write_text("")
        return found


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def waiting(index: int = 0, **stages: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """All four stages of a run pending, but for those said."""
    plain = {"prepare": ("PENDING", "Priority"), **dict.fromkeys(STAGES[1:], ("PENDING", "Dependency")), **stages}
    return {f"{ARRAYS[index // PER_ARRAY][stage]}_{index % PER_ARRAY}": told for stage, told in plain.items()}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    value = json.loads(shown(capsys, "status", "--json", *words))
    assert isinstance(value, dict)
    return value


def only(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (row,) = told(capsys)["runs"]
    assert isinstance(row, dict)
    return row


def life(run: RunDir, stage: str, number: int, text: str, *, at: int) -> Path:
    """A life that has appended `text` to its stage's log."""
    job = f"{ARRAYS[0][stage]}_0"
    log = run.slurm / stage / f"{job}_0_log.out"
    log.parent.mkdir(exist_ok=True)
    size = log.stat().st_size if log.exists() else 0
    if not (begun := run.lives / f"{stage}-{number}").exists():
        begun.write_text(f"{job} n1 {at} {log.name}:{size}\n")
    with log.open("a") as file:
        file.write(text)
    return log
