"""Gathers the evidence of how an attempt ended: its own files, the ends of its logs, accounting and the controller.

The one place that reads them; `ftlib/runs/diagnosis.py` judges. A source that does not answer is left out. Standard
library only: it runs on the batch host.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlib.errors import Unavailable
from ftlib.runs.attempts import Attempt
from ftlib.runs.diagnosis import CLOCKS_S, Accounted, Controller, Evidence
from ftlib.runs.events import Cancelled
from ftlib.runs.ledger import Ledger
from ftlib.slurm import client
from ftlib.slurm.controller import SlurmController

# What is read of a log: its end, where the reason stands.
LOG_TAIL_BYTES = 64 * 1024
# The prologue's first line in every start of a job.
_STARTED = re.compile(r"^ftlib: start \d+ of job ", re.MULTILINE)
# Each call to Slurm; its commands try for about as long by themselves while the controller is away.
ASK_S = 30
# The job was submitted with a warning no longer than this part of its time limit (see batch.parameters).
WARNING_SHARE = 4


def gather(
    run: Path, ledger: Ledger, stage: str, number: int, *, exit_code: int | None = None, epilogue: bool = False,
    slurm: bool = True, job_id: str = "", log_folder: Path | None = None,
) -> Evidence:  # fmt: skip
    """All that is known of the end of attempt `number` of a stage of the run folder `run`.

    exit_code: srun's. epilogue: the attempt's own epilogue asks, from its job. slurm: it ran in a Slurm job. job_id:
    its job, where its file need not be asked. log_folder: where its logs are, if elsewhere.
    """
    attempt = ledger.attempt(stage, number)
    job = job_id or attempt.job_id
    outcome = ledger.outcome(stage, number)
    accounted = accounted_end(job, attempt.began) if slurm else None
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0") if epilogue and slurm else ""
    planned = _submitted_with(run, stage, job)
    return Evidence(
        slurm=slurm,
        epilogue=epilogue,
        exit_code=exit_code,
        outcome_code=outcome.code if outcome else None,
        outcome_message=outcome.message if outcome else "",
        logs=read_logs(ledger, attempt, job, log_folder or run / "slurm" / stage),
        ranks=int(planned.get("nodes", 0)) * int(planned.get("tasks_per_node", 0)) or None,
        accounted=accounted,
        controller=controller_says(job) if slurm else None,
        restarts=int(restarts) if restarts.isdigit() else None,
        cancelled_at=_cancelled_at(ledger, stage, job),
        warning_s=_warning_s(planned, epilogue=epilogue),
        began=attempt.began or None,
        ended=time.time() if epilogue else accounted.ended if accounted else None,
        planned_end=_planned_end(planned, attempt, epilogue=epilogue),
    )


def _submitted_with(run: Path, stage: str, job: str) -> dict[str, Any]:
    """What the job requested for the stage (see requests.py); the plan that was shown, where nothing recorded it."""
    folder = run / "slurm" / stage
    for file in (folder / f"{job}_request.json", folder / "request.json"):
        if requested := _read(file).get("stage"):
            return dict(requested)
    return dict(_read(run / "plan.json").get("stages", {}).get(stage, {}))


def _warning_s(planned: dict[str, Any], *, epilogue: bool) -> float | None:
    """The lead of the warning, in seconds: the prologue read it from the script that runs; else the plan's."""
    submitted = os.environ.get("FT_WARNING_S", "") if epilogue else ""
    if submitted.isdigit():
        return float(submitted)
    if "warning_s" not in planned or "time_min" not in planned:
        return None
    return float(min(planned["warning_s"], planned["time_min"] * 60 // WARNING_SHARE))


def _planned_end(planned: dict[str, Any], attempt: Attempt, *, epilogue: bool) -> float | None:
    """When the time limit that was submitted is over, in seconds since 1970."""
    # A job that stages share says itself when it ends: its limit is not the stage's, nor did it begin with this one.
    shared = os.environ.get("FT_ENDS", "") if epilogue else ""
    if shared.isdigit():
        return float(shared)
    return attempt.began + 60.0 * planned["time_min"] if attempt.began and "time_min" in planned else None


def _cancelled_at(ledger: Ledger, stage: str, job: str) -> float | None:
    """When `make cancel` has ended the stage's job, in seconds since 1970; None where it has not."""
    return next((event.time for event in ledger.of(Cancelled, stage) if event.job_id == job), None)


# -- logs --------------------------------------------------------------------------------------------------------------


def read_logs(ledger: Ledger, attempt: Attempt, job: str, folder: Path) -> dict[int, str]:
    """The end of what each rank wrote in this attempt, by rank; without the logs that do not exist."""
    after = ledger.attempt(attempt.stage, attempt.number + 1)
    # The next attempt of the same job appends to the same logs.
    stops = after.log_starts if after.job_id == job else {}
    logs = {}
    for path in folder.glob(f"{job}_*_log.out"):
        rank = path.name.removeprefix(f"{job}_").removesuffix("_log.out")
        if rank.isdigit():
            text = tail(path, start=attempt.log_starts.get(path.name, 0), stop=stops.get(path.name))
            logs[int(rank)] = until_restart(text)
    return dict(sorted(logs.items()))


def until_restart(text: str) -> str:
    """An attempt's part of a log, without what a later start of its job wrote that ended before its own attempt began:
    why that one ended says nothing about this one."""
    starts = list(_STARTED.finditer(text))
    return text[: starts[1].start()] if len(starts) > 1 else text


def tail(path: Path, start: int = 0, stop: int | None = None) -> str:
    """The end of a log file, of the bytes from `start` to `stop` (None: the file's end); empty without a file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = size if stop is None else min(stop, size)
            begin = max(start, end - LOG_TAIL_BYTES)
            file.seek(begin)
            return file.read(max(0, end - begin)).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


# -- Slurm -------------------------------------------------------------------------------------------------------------


def accounted_end(job: str, began: float) -> Accounted | None:
    """What accounting says of the attempt of `job` that began then; None where it has no answer.

    Every start of a requeued job has a row, followed by those of its steps; the attempt's is the last that started
    before it. A job that was requeued by hand may have lost its start, and its batch step has it still.
    """
    return accounted_in(_ask("sacct", "-D", "-n", "-P", "-j", job, "-o", "JobID,State,ExitCode,Start,End"), began)


def accounted_in(text: str, began: float) -> Accounted | None:
    """The same, of sacct's answer: lines of JobID|State|ExitCode|Start|End, times in seconds since 1970."""
    found: tuple[float, Accounted] | None = None
    for rows in _starts(text):
        _, state, exit_code, _, ended = rows[0]
        started = min((float(row[3]) for row in rows if row[3].isdigit()), default=None)
        if started is None or started > began + CLOCKS_S or (found and found[0] > started):
            continue
        # Accounting may be late: the newest row that it has is of an earlier start then.
        if ended.isdigit() and float(ended) < began - CLOCKS_S:
            continue
        signal = exit_code.partition(":")[2]
        accounted = Accounted(
            state=state,
            ended=float(ended) if ended.isdigit() else None,
            shell_signal=int(signal) if signal.isdigit() else None,
        )
        found = started, accounted
    return found[1] if found else None


def _starts(text: str) -> Iterator[list[list[str]]]:
    """sacct's rows, those of one start of the job together: its own, then its steps'."""
    together: list[list[str]] = []
    for line in text.splitlines():
        row = line.split("|")
        if len(row) != 5:
            continue
        if "." not in row[0] and together:
            yield together
            together = []
        together.append(row)
    if together:
        yield together


def controller_says(job: str) -> Controller | None:
    """What the controller says of a job now; None where it does not answer or has forgotten the job."""
    return controller_in(SlurmController().fields(job))


def controller_in(values: Mapping[str, str]) -> Controller | None:
    """The same, of the fields of `scontrol show job`."""
    if "JobState" not in values:
        return None
    restarts, signal = values.get("Restarts", ""), values.get("ExitCode", "").partition(":")[2]
    return Controller(
        state=values["JobState"],
        reason=values.get("Reason", ""),
        started=_moment(values.get("StartTime", "")),
        ends=_moment(values.get("EndTime", "")),
        preempted=_moment(values.get("PreemptTime", "")),
        restarts=int(restarts) if restarts.isdigit() else None,
        shell_signal=int(signal) if signal.isdigit() else None,
    )


def _moment(text: str) -> float | None:
    """Seconds since 1970; None for Slurm's None, Unknown and N/A."""
    return float(text) if text.isdigit() else None


def _ask(*command: str) -> str:
    """A Slurm command's answer; empty without one."""
    try:
        return client.call(*command, timeout_s=ASK_S)
    except Unavailable:
        return ""


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the run folder; empty where it is not there."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value
