"""Every cause is named rightly, and the right thing done: real logs with their exit codes, budgets, the settling."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import get_args

import pytest

from ftlib.rundir import RunDir
from ftlib.runs import diagnosis, policy
from ftlib.runs.events import Cancelled, CheckpointSaved, Settled, Submitted
from ftlib.runs.policy import Life, decide
from ftlib.slurm import settle

LOGS = Path(__file__).parent / "logs"

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
    ("rank-warned", 140, "time limit", "task 0: User defined signal 2"),
    ("stepd-killed", 137, "killed", "slurmstepd is gone"),
    # One fault brings the next: a rank that ends for a reason of its own cuts its peers' connections.
    ("gpu-oom-beside-gloo", 1, "GPU memory", "CUDA out of memory"),
]


def log(name: str) -> str:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "code", "cause", "shown"), REPLAYED, ids=[row[0] for row in REPLAYED])
def test_a_real_log_is_named_rightly(name: str, code: int, cause: str, shown: str) -> None:
    found = diagnosis.life_cause(code=code, outcome=None, log=log(name))
    assert found.cause == cause
    assert shown in found.line and "\n" not in found.line


def test_every_log_of_the_folder_is_replayed() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == {row[0] for row in REPLAYED} | {"healthy"}


def test_a_healthy_log_says_nothing_of_a_cause() -> None:
    assert diagnosis.from_log(log("healthy")) is None


@pytest.mark.parametrize(
    ("code", "words", "cause"),
    [
        (75, "interrupted (preemption), saved at step 12", "preemption"),
        (75, "interrupted (time limit), saved at step 12", "time limit"),
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
    assert diagnosis.life_cause(code=code, outcome=words, log="").cause == cause


def test_a_warning_that_was_heeded_is_no_fault_whatever_the_log_says_of_connections() -> None:
    found = diagnosis.life_cause(code=75, outcome="interrupted (preemption), saved at step 9", log=log("gloo-closed"))
    assert found.cause == "preemption"


def test_a_step_that_comes_down_after_a_rank_is_not_held_against_its_daemon() -> None:
    after = log("nccl-watchdog") + log("stepd-killed")
    assert diagnosis.life_cause(code=137, outcome=None, log=after).cause == "collective"


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
def test_where_slurm_ended_the_life_the_broken_connections_came_of_that(state: str, cause: str) -> None:
    assert diagnosis.life_cause(code=1, outcome=None, log=log("gloo-closed"), accounted=state).cause == cause


def test_a_failed_job_says_less_than_its_log() -> None:
    assert diagnosis.life_cause(code=1, outcome=None, log=log("gpu-oom"), accounted="FAILED").cause == "GPU memory"
    assert diagnosis.life_cause(code=137, outcome=None, log="", accounted="FAILED").cause == "killed"


def test_signals_before_the_handler_stands_and_silent_kills() -> None:
    causes = [diagnosis.life_cause(code=code, outcome=None, log="").cause for code in (140, 143, 137, 139)]
    assert causes == ["time limit", "preemption", "killed", "killed"]


def test_every_cause_has_words_a_budget_and_a_mend() -> None:
    assert set(get_args(diagnosis.Cause)) == set(policy.KINDS)


# -- what is done ------------------------------------------------------------------------------------------------------


def ended(cause: diagnosis.Cause, *, progressed: bool = False, times: int = 1) -> list[Life]:
    return [Life(cause, progressed)] * times


def test_preemption_is_free_while_the_run_gets_on() -> None:
    assert decide(ended("preemption", progressed=True, times=500), micro_batch=8).requeue


@pytest.mark.parametrize("cause", ["preemption", "time limit", "by hand"])
def test_but_not_for_ever_without_a_step(cause: diagnosis.Cause) -> None:
    assert decide(ended(cause, times=9), micro_batch=8).requeue
    assert not decide(ended(cause, times=10), micro_batch=8).requeue


def test_three_barren_lives_of_its_own_doing_stop_and_a_step_between_saves_it() -> None:
    assert not decide(ended("killed", times=3), micro_batch=8).requeue
    twice = [*ended("killed", times=2), *ended("preemption")]
    assert decide([*twice, *ended("killed", progressed=True)], micro_batch=8).requeue
    assert not decide([*twice, *ended("collective")], micro_batch=8).requeue


@pytest.mark.parametrize("cause", ["disk full", "input", "code", "idle GPU", "cancelled"])
def test_what_another_try_would_not_mend_stops_at_once(cause: diagnosis.Cause) -> None:
    decision = decide(ended(cause, progressed=True), micro_batch=8)
    assert not decision.requeue and policy.KINDS[cause].plain in decision.words


def test_the_wait_after_a_passing_fault_doubles_and_its_budget_ends() -> None:
    waits = [decide(ended("transient", progressed=True, times=n), micro_batch=8) for n in range(1, 7)]
    assert [w.backoff_s for w in waits[:5]] == [30, 60, 120, 240, 480]
    assert [w.requeue for w in waits] == [True] * 5 + [False]


def test_budgets_are_counted_by_cause() -> None:
    lives = [*ended("transient", progressed=True, times=5), *ended("collective", progressed=True)]
    assert decide(lives, micro_batch=8).requeue


# -- the epilogue's settling, over a run folder ------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder with a plan; Slurm's commands are not there."""
    folder = tmp_path / "tiny-0123abcd"
    for name in ("events", "outcomes", "lives", "slurm/train"):
        (folder / name).mkdir(parents=True)
    plan = {"micro_batch": 8, "accumulation": 2, "stages": {"train": {"time_min": 60}}}
    (folder / "plan.json").write_text(json.dumps(plan))
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return RunDir(folder)


def shim(run: RunDir, name: str, body: str) -> None:
    path = run.path.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def life(
    run: RunDir, number: int, text: str = "", *, code: int = 1, outcome: str = "", rank: int = 0
) -> settle.Verdict:
    """A life of the train stage begins, writes its log, and ends."""
    file = run.slurm / "train" / f"7_{rank}_log.out"
    sizes = " ".join(f"{p.name}:{p.stat().st_size}" for p in file.parent.glob("7_*_log.out"))
    (run.lives / f"train-{number}").write_text(f"7 n1 {1_700_000_000 + 10 * number} {sizes}\n")
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
    if outcome:
        (run.outcomes / f"train-{number}").write_text(outcome + "\n")
    return settle.end(run.path, "train", number, code, "7", run.slurm / "train" / "7_0_log.out")


def committed(run: RunDir, number: int, step: int) -> None:
    run.record(CheckpointSaved(stage="train", attempt=number, step=step), writer=f"train-{number}")


def causes(run: RunDir) -> list[str]:
    """Why its attempts ended, as it was settled."""
    return [settled.cause for settled in run.ledger().of(Settled)]


def test_gpu_memory_halves_the_micro_batch_to_one_and_keeps_the_global_batch(run: RunDir) -> None:
    seen = []
    for number in (1, 2, 3):
        committed(run, number, 10 * number)
        assert life(run, number, log("gpu-oom")).do == "requeue"
        seen.append((run.plan()["micro_batch"], run.plan()["accumulation"]))
    assert seen == [(4, 4), (2, 8), (1, 16)]
    committed(run, 4, 40)
    verdict = life(run, 4, log("gpu-oom"))
    assert verdict.do == "stop" and "cannot be smaller" in verdict.words
    assert [change.value for change in run.ledger().overrides(time.time()).history] == [4, 2, 1]


def test_host_memory_asks_for_half_as_much_again_twice_at_most(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4000")
    committed(run, 1, 10)
    assert life(run, 1, log("host-oom"), code=137).line().startswith("requeue 0 - 6000 ")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "6000")
    assert life(run, 2, log("host-oom"), code=137).line().startswith("requeue 0 - 9000 ")
    assert life(run, 3, log("host-oom"), code=137).do == "stop"


def test_no_more_host_memory_is_asked_for_than_a_node_has(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = json.loads(run.plan_file.read_text())
    stages = {"train": {"partition": "gpu", "time_min": 60}}
    run.plan_file.write_text(json.dumps({**plan, "stages": {**plan.get("stages", {}), **stages}}))
    sides = [{"name": "cpu", "mem_gib_per_node": 1}, {"name": "gpu", "mem_gib_per_node": 5}]
    run.provenance_file.write_text(json.dumps({"profile": {"partitions": sides}}))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4000")
    assert life(run, 1, log("host-oom"), code=137).mem_mib == "5120"


def test_the_owners_excluded_nodes_and_earlier_ones_stay_excluded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.provenance_file.write_text(json.dumps({"profile": {"exclude": "bad[1-2]"}}))
    for number, node in enumerate(("n1", "n2"), 1):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        verdict = life(run, number, log("ecc"))
    assert verdict.exclude == "bad[1-2],n1,n2"


def test_a_bad_gpu_leaves_its_node_out_for_a_day(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    verdict = life(run, 1, log("ecc"))
    assert (verdict.do, verdict.exclude) == ("requeue", "n1")
    (excluded,) = run.ledger().overrides(time.time()).history
    assert excluded.until and time.time() + 23 * 3600 < excluded.until < time.time() + 25 * 3600
    assert run.ledger().overrides(excluded.until - 60).excluded == ("n1",)
    assert run.ledger().overrides(excluded.until + 60).excluded == ()


def test_the_bad_gpu_of_another_rank_leaves_that_ranks_node_out(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    shim(run, "scontrol", 'test "$2" = hostnames && echo n1 && echo n2')
    assert life(run, 1, log("ecc"), rank=3).exclude == "n2"


def test_what_an_earlier_life_wrote_into_the_log_is_not_held_against_a_later_one(run: RunDir) -> None:
    committed(run, 1, 10)
    assert life(run, 1, log("gpu-oom")).do == "requeue"
    life(run, 2, log("stale-nfs"))
    assert causes(run) == ["GPU memory", "transient"]


def test_a_person_who_resumes_begins_the_count_anew(run: RunDir) -> None:
    for number in (1, 2, 3):
        verdict = life(run, number, code=137)
    assert verdict.do == "stop"
    run.record(Submitted(stage="train", job_id="8", after_attempt=3))
    assert life(run, 4, code=137).do == "requeue"
    # The guard is no person.
    run.record(Submitted(stage="train", job_id="9", after_attempt=4, automatic=True))
    assert life(run, 5, code=137).do == "requeue"
    assert life(run, 6, code=137).do == "stop"


SAVED = "75 interrupted (preemption), saved at step 9"
LIMIT = "75 interrupted (time limit), saved at step 9"


@pytest.mark.parametrize(
    ("outcome", "sacct", "job", "cause"),
    [
        (SAVED, "RUNNING", "PreemptTime=1700000100 EndTime=1999999999", "preemption"),
        (SAVED, "RUNNING", "PreemptTime=None EndTime=1999999999", "by hand"),
        (SAVED, "REQUEUED", "", "by hand"),
        (SAVED, "PREEMPTED", "", "preemption"),
        (SAVED, "NODE_FAIL", "", "node failure"),
        (LIMIT, "RUNNING", "PreemptTime=None EndTime=1700000000", "time limit"),
        (LIMIT, "RUNNING", "PreemptTime=None EndTime=1999999999", "by hand"),
        # Nobody answers: what the stage said stands, and the plan tells how far the limit was.
        (SAVED, "", "", "preemption"),
        (LIMIT, "", "", "time limit"),
    ],
)
def test_the_sender_of_a_warning_is_found(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, outcome: str, sacct: str, job: str, cause: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    # Accounting lists every life of the job; this one is the second.
    shim(run, "sacct", f"echo '1600000000|PREEMPTED'; echo '1700000001|{sacct}'" if sacct else "exit 1")
    shim(run, "scontrol", f"echo 'JobId=7 {job}'" if job else "exit 1")
    life(run, 1, outcome=outcome)
    assert causes(run) == [cause]


def test_without_an_answer_a_job_of_two_stages_says_itself_when_it_ends(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's limit is the stage's own, and its attempt did not begin with the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("FT_ENDS", "1999999999")
    life(run, 1, outcome=LIMIT)
    monkeypatch.setenv("FT_ENDS", "1700000000")
    life(run, 2, outcome=LIMIT)
    assert causes(run) == ["by hand", "time limit"]


def test_the_next_lifes_prologue_settles_what_no_epilogue_saw(run: RunDir) -> None:
    states = ("NODE_FAIL", "FAILED", "NODE_FAIL", "RUNNING")
    shim(run, "sacct", ";".join(f"echo '17000000{n}0|{state}'" for n, state in enumerate(states, 1)))
    for number in (1, 2, 3, 4):
        (run.lives / f"train-{number}").write_text(f"7 n1 {1_700_000_000 + 10 * number} \n")
    # The SIGTERM with which Slurm clears a lost node looks like a preemption's to a process that still lives there.
    (run.outcomes / "train-3").write_text("75 interrupted (preemption), saved at step 2\n")
    settle.earlier(run.path, "train", 4, "train-4-prologue", by="prologue")
    settle.earlier(run.path, "train", 4, "train-4-prologue", by="prologue")
    expected: list[diagnosis.Cause] = ["node failure", "killed", "node failure"]
    settled = run.ledger().of(Settled)
    assert [(one.attempt, one.cause, one.by) for one in settled] == [
        (number, cause, "prologue") for number, cause in enumerate(expected, 1)
    ]
    assert settle.settled_lives(run.ledger(), "train", 4) == [Life(cause, False) for cause in expected]


def test_a_job_that_was_cancelled_as_it_ended_is_neither_requeued_nor_begun_again(run: RunDir) -> None:
    """`make cancel` in the second in which the epilogue requeues: Slurm may know the job as TIMEOUT, not CANCELLED."""
    run.record(Cancelled(stage="train", job_id="7"))
    verdict = life(run, 1, outcome=LIMIT)
    assert verdict.do == "stop" and "its owner cancelled it" in verdict.words
    (run.lives / "train-2").write_text("7 n1 1700000020 \n")
    with pytest.raises(SystemExit) as refused:
        settle.main(["earlier", str(run.path), "train", "2", "7"])
    assert refused.value.code == settle.CANCELLED
    # What `make resume` queues has another job id.
    settle.main(["earlier", str(run.path), "train", "2", "8"])
