"""Why an attempt ended: the right cause where the evidence tells it, "unknown" where it does not, never a wrong one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest

from ftlib.runs import policy, signatures
from ftlib.runs.diagnosis import Accounted, Cause, Controller, Evidence, cause_of
from tests.worlds import BEGAN, BY_REQUEST, ENDED, FAR, NEAR, TOLD, USR2, WORLDS, World, log, running, saved, world

BY_NAME = {world.name: world for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS, ids=[world.name for world in WORLDS])
def test_the_whole_evidence_tells_the_cause(world: World) -> None:
    finding = cause_of(world.evidence)
    assert finding.cause == (world.truths[0] if world.certain else "unknown")
    assert finding.message, "a person wants to know what it was seen from"


# What may be missing together: the times of an attempt stand in one file.
MISSING: tuple[dict[str, Any], ...] = (
    {"outcome_code": None, "outcome_message": ""},
    {"exit_code": None},
    {"accounted": None},
    {"controller": None},
    {"warning_s": None},
    {"planned_end": None},
    {"began": None, "restarts": None},
)


def partial(whole: Evidence) -> Iterator[Evidence]:
    """The evidence with every subset of its sources missing, each rank's log by itself."""
    ranks = sorted(whole.logs)
    for some in product((False, True), repeat=len(MISSING)):
        gone: dict[str, Any] = {}
        for source, missing in zip(MISSING, some, strict=True):
            gone |= source if missing else {}
        for kept in product((False, True), repeat=len(ranks)):
            logs = {rank: whole.logs[rank] for rank, here in zip(ranks, kept, strict=True) if here}
            yield replace(whole, **gone, logs=logs)


@pytest.mark.parametrize("world", WORLDS, ids=[world.name for world in WORLDS])
def test_whatever_evidence_is_missing_the_cause_is_right_or_unknown(world: World) -> None:
    for evidence in partial(world.evidence):
        finding = cause_of(evidence)
        assert finding.cause in (*world.truths, "unknown"), (finding, evidence)


@pytest.mark.parametrize("world", WORLDS, ids=[world.name for world in WORLDS])
def test_the_owners_cancellation_may_go_unrecorded_or_its_time_unknown(world: World) -> None:
    for gone in ({"cancelled_at": None}, {"ended": None}, {"cancelled_at": None, "ended": None}):
        assert cause_of(replace(world.evidence, **gone)).cause in (*world.truths, "unknown")


@pytest.mark.parametrize(
    "name",
    [
        "preempted, saved", "preempted without grace", "time limit, saved", "time limit outstayed", "SIGUSR2 by hand",
        "scontrol requeue, saved", "scancel, saved", "scancel, outstayed", "scancel on 26.05", "worker killed",
        "second rank killed, the first saved", "batch shell killed, saved", "node down, the batch host's tasks saved",
    ],
)  # fmt: skip
def test_a_site_without_accounting_still_learns_the_cause(name: str) -> None:
    assert cause_of(replace(BY_NAME[name].evidence, accounted=None)).cause == BY_NAME[name].truths[0]


@pytest.mark.parametrize("name", [world.name for world in WORLDS if world.truths[0] == "cancelled"])
def test_accounting_or_the_log_suffices_to_know_a_cancellation(name: str) -> None:
    evidence = replace(BY_NAME[name].evidence, controller=None)
    assert cause_of(replace(evidence, logs={})).cause == "cancelled"
    if "*** JOB" in evidence.first_log:
        assert cause_of(replace(evidence, accounted=None)).cause == "cancelled"


@pytest.mark.parametrize(
    ("warning_s", "left_s", "cause"),
    [
        (90, 151, "time limit"),
        (90, 153, "by hand"),
        (600, 650, "time limit"),
        (600, 663, "by hand"),
        (30, 92, "time limit"),
        (30, 93, "by hand"),
    ],
)
def test_near_the_limit_follows_from_the_warning_that_was_submitted(
    warning_s: float, left_s: float, cause: Cause
) -> None:
    """Slurm sends it up to a minute before its lead."""
    known = world("", logs=BY_REQUEST, controller=running(ends=ENDED + left_s), **saved(USR2)).evidence
    assert cause_of(replace(known, warning_s=warning_s)).cause == cause


def test_without_the_controller_a_planned_end_tells_a_time_limit_but_not_by_whom_a_far_one_was_sent() -> None:
    """The limit may have been shortened since."""
    known = world("", logs=BY_REQUEST, controller=None, accounted=None, **saved(USR2)).evidence
    assert cause_of(replace(known, planned_end=NEAR)).cause == "time limit"
    assert cause_of(replace(known, planned_end=FAR)).cause == "unknown"


def test_sigterm_of_an_unknown_sender_is_unknown_and_says_so() -> None:
    finding = cause_of(replace(BY_NAME["SIGTERM by hand"].evidence, controller=None, accounted=None))
    assert finding.cause == "unknown" and "SIGTERM" in finding.message


def test_a_signal_to_the_batch_shell_of_a_running_job_is_no_cancellation() -> None:
    notice = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T18:45:57 ***\n"
    known = world("", logs=notice + TOLD, **saved("interrupted (preemption), saved at step 3")).evidence
    assert cause_of(known).cause == "by hand"


def test_the_controllers_word_for_the_next_attempt_is_not_held_against_the_last_one() -> None:
    after = Controller(state="CANCELLED", started=ENDED + 60, ends=ENDED + 60, restarts=1)
    known = world("", logs=log("gpu-oom"), controller=after).evidence
    assert known.of_attempt is None
    assert cause_of(known).cause == "GPU memory"
    assert replace(known, controller=running(restarts=1)).of_attempt is None, "it began in the same second"


def test_a_requeue_of_the_epilogue_that_could_not_settle_the_cause_is_not_somebodys() -> None:
    text = f"{log('io-error')}ftlib: the cause of this end could not be settled (is the disk full?)\n{log('requeued')}"
    known = world("", logs=text, epilogue=False, state="REQUEUED", exit_code=None, restarts=None).evidence
    assert cause_of(known).cause == "transient"


def test_what_is_missing_of_a_lost_rank_is_named() -> None:
    finding = cause_of(BY_NAME["slurmstepd of the second node killed"].evidence)
    assert "rank 1" in finding.message and "did not arrive" in finding.line


def test_a_silent_end_says_what_slurm_says() -> None:
    finding = cause_of(Evidence(accounted=Accounted(state="FAILED"), began=BEGAN))
    assert finding.cause == "unknown" and "Slurm says FAILED" in finding.message


# -- logs --------------------------------------------------------------------------------------------------------------

# log, exit code, cause, the words that show it. Where a log is not our own run's, the report it was taken from.
REPLAYED = [
    ("host-oom", 137, "host memory", "Detected 1 oom_kill event"),  # github.com/chrisknewman/tusas/issues/149
    ("host-oom-cgroup", 137, "host memory", "oom-kill event(s)"),  # github.com/ArjunaCluster/ArjunaUsers/issues/52
    ("host-oom-torch", 1, "host memory", "can't allocate memory"),
    ("gpu-oom", 1, "GPU memory", "CUDA out of memory"),  # github.com/pytorch/pytorch/issues/16417
    ("gpu-oom-cublas", 1, "GPU memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    ("ecc", 1, "bad GPU", "uncorrectable ECC error"),  # github.com/kohya-ss/sd-scripts/issues/1434
    ("xid", 1, "bad GPU", "Xid (PCI:0000:07:00): 79"),
    ("busy", 1, "bad GPU", "busy or unavailable"),  # github.com/ZhengZerong/PaMIR/issues/17
    ("busy-new", 1, "bad GPU", "busy or unavailable"),  # github.com/E3SM-Project/E3SM/issues/8699
    ("nccl-watchdog", 134, "collective", "Watchdog caught"),  # github.com/hiyouga/LlamaFactory/issues/7396
    ("nccl-remote", 1, "collective", "NCCL error"),  # github.com/NVIDIA/nccl/issues/2076
    ("gloo-closed", 1, "collective", "gloo/transport"),  # github.com/IAHispano/Applio/issues/126
    ("gloo-reset", 1, "collective", "Read error"),  # github.com/RVC-Project/…-WebUI/issues/1882
    ("port-taken", 1, "collective", "EADDRINUSE"),  # github.com/vllm-project/vllm/issues/39015
    ("rank-missing", 1, "collective", "rank 1 (node n2) did not arrive"),
    ("disk-full", 1, "disk full", "No space left"),
    ("quota", 1, "disk full", "Disk quota exceeded"),  # github.com/junyanz/…-CycleGAN-and-pix2pix/issues/1456
    ("stale-nfs", 1, "transient", "Stale file handle"),  # github.com/modelscope/ms-swift/issues/6695
    ("io-error", 1, "transient", "Input/output error"),  # github.com/pytorch/pytorch/issues/10577
    ("hub-down", 1, "transient", "Read timed out"),
    ("import-error", 1, "code", "ImportError"),
    ("node-down", 1, "node failure", "Node failure on n1"),
    ("worker-killed", 137, "killed", "task 0: Killed"),
    ("rank-killed", 137, "killed", "task 1: Killed"),
    ("rank-killed-saved", 75, "killed", "task 1: Killed"),
    ("stepd-killed", 137, "killed", "slurmstepd is gone"),
    ("srun-killed", 137, "killed", "srun"),
    ("shell-killed", None, "killed", "other failure mode"),
    ("scancel", 75, "cancelled", "*** JOB"),
    ("scancel-outstayed", 0, "cancelled", "*** JOB"),
    ("scancel-26", 75, "cancelled", "*** JOB"),
    ("scancel-two-ranks", 75, "cancelled", "*** JOB"),
    ("preempted", None, "preemption", "DUE TO PREEMPTION"),
    ("preempted-26", None, "preemption", "DUE TO PREEMPTION"),
    ("limit-outstayed", None, "time limit", "DUE TO TIME LIMIT"),
    ("requeued", 75, "by hand", "DUE TO JOB REQUEUE"),
    ("requeued-26", 75, "by hand", "DUE TO JOB REQUEUE"),
    # These alone do not tell who sent the signal, or what became of the other rank.
    ("rank-warned", 140, "unknown", "task 0: User defined signal 2"),
    ("preempted-saved", 75, "unknown", ""),
    ("stepd-killed-beyond", 137, "unknown", "did not arrive"),
    # One fault brings the next: a rank that ends for a reason of its own cuts its peers' connections.
    ("gpu-oom-beside-gloo", 1, "GPU memory", "CUDA out of memory"),
]


@pytest.mark.parametrize(("name", "code", "cause", "shown"), REPLAYED, ids=[row[0] for row in REPLAYED])
def test_a_real_log_is_named_rightly(name: str, code: int | None, cause: str, shown: str) -> None:
    ranks = 2 if name.startswith(("rank-k", "stepd-killed-b", "scancel-two")) else None
    evidence = Evidence(epilogue=code is not None, exit_code=code, logs={0: log(name)}, ranks=ranks, began=BEGAN)
    finding = cause_of(evidence)
    assert finding.cause == cause
    assert shown in finding.line and "\n" not in finding.line


def test_every_log_of_the_folder_is_replayed() -> None:
    from tests.worlds import LOGS

    assert {path.stem for path in LOGS.glob("*.log")} == {row[0] for row in REPLAYED} | {"healthy"}


def test_a_healthy_log_tells_no_cause() -> None:
    assert signatures.from_log(log("healthy")) is None
    # Its last line was written late, by the slurmstepd of the attempt before.
    assert signatures.notice(log("healthy"), since=at("2026-11-21T04:31:45")) is None
    assert signatures.notice(log("healthy"), since=None) is None
    finding = signatures.notice(log("healthy"), since=at("2026-11-21T04:31:30"))
    assert finding and finding.cause == "by hand"


def at(moment: str) -> float:
    """Seconds since 1970 of a local time."""
    return time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))


def test_a_line_of_srun_that_speaks_of_several_ranks_is_read() -> None:
    text = "srun: error: n1: tasks 0-2,5: Killed\nsrun: error: n2: task 7: Exited with exit code 75\n"
    ends = signatures.rank_ends(text)
    assert [end.rank for end in ends] == [0, 1, 2, 5, 7]
    assert [end.signal for end in ends] == ["Killed"] * 4 + [""] and ends[-1].saved


@pytest.mark.parametrize(
    ("code", "words", "cause"),
    [
        (75, "interrupted (idle GPU), saved at step 12", "idle GPU"),
        (64, "train.jsonl, line 3: has no field 'prompt'", "input"),
        (64, "no space left for a checkpoint: 120 MiB needed, 4 MiB free at /blue", "disk full"),
        (64, "the checkpoint of step 40 could not be written, with 0.1 MiB free in /blue (unexpected)", "disk full"),
        (76, "uncorrectable ECC error", "bad GPU"),
        (1, "ValueError: too many values to unpack", "code"),
        (1, "FtError: training diverged at step 3", "code"),
        (1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "GPU memory"),
    ],
)
def test_what_a_stage_says_itself_decides(code: int, words: str, cause: str) -> None:
    assert cause_of(Evidence(epilogue=True, outcome_code=code, outcome_message=words)).cause == cause


def test_a_step_that_comes_down_after_a_rank_is_not_held_against_its_daemon() -> None:
    after = log("nccl-watchdog") + log("stepd-killed")
    assert cause_of(Evidence(epilogue=True, exit_code=137, logs={0: after})).cause == "collective"


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("NODE_FAIL", "node failure"),
        ("PREEMPTED", "preemption"),
        ("TIMEOUT", "time limit"),
        ("REQUEUED", "by hand"),
        ("OUT_OF_MEMORY", "host memory"),
        ("CANCELLED by 1000", "cancelled"),
    ],
)
def test_where_slurm_ended_the_attempt_the_broken_connections_came_of_that(state: str, cause: str) -> None:
    evidence = Evidence(epilogue=True, exit_code=1, logs={0: log("gloo-closed")}, accounted=Accounted(state=state))
    assert cause_of(evidence).cause == cause


def test_a_failed_job_says_less_than_its_log() -> None:
    failed = Accounted(state="FAILED", shell_signal=9)
    assert cause_of(Evidence(exit_code=1, logs={0: log("gpu-oom")}, accounted=failed)).cause == "GPU memory"
    assert cause_of(Evidence(accounted=failed)).cause == "killed"


def test_an_exit_code_alone_tells_nothing() -> None:
    """137 may be the memory, a preemption, a node or an operator."""
    causes = {cause_of(Evidence(epilogue=True, exit_code=code)).cause for code in (0, 1, 137, 139, 140, 143)}
    assert causes == {"unknown"}


def test_every_cause_has_words_a_budget_and_a_fix() -> None:
    assert set(get_args(Cause)) == set(policy.KINDS)
    assert policy.KINDS["unknown"].budget == policy.KINDS["killed"].budget
