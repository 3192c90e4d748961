"""Slurm's controller for the batch script of a job: its own job's state, requeueing it, changing its next attempt.
Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from ftlib.errors import Unavailable
from ftlib.slurm import client

TIMEOUT_S = 30


class SlurmController:
    """`ftlib.runs.scheduler.Controller` by scontrol."""

    def state(self, job_id: str) -> str | None:
        fields = self.fields(job_id)
        return fields.get("JobState") if fields else None

    def restarts(self, job_id: str) -> int | None:
        restarts = self.fields(job_id).get("Restarts", "")
        return int(restarts) if restarts.isdigit() else None

    def fields(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, field by field; empty where the controller does not answer."""
        try:
            text = client.call("scontrol", "show", "job", "-o", job_id, timeout_s=TIMEOUT_S)
        except Unavailable:
            return {}
        pairs = (word.partition("=") for word in text.split())
        return {name: value for name, separator, value in pairs if separator}

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        return self._accepted("requeue", *(["Incomplete"] if incomplete_only else []), job_id)

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        return self._accepted("update", f"JobId={job_id}", *(f"{name}={value}" for name, value in changes.items()))

    def _accepted(self, *words: str) -> bool:
        try:
            client.call("scontrol", *words, timeout_s=TIMEOUT_S)
        except Unavailable:
            return False
        return True
