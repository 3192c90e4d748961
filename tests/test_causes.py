"""What is done about a cause, within which budget; and how the epilogue and the next attempt settle an end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from ftlib.plan import numerics
from ftlib.plan.numerics import Numerics, StageNumerics
from ftlib.rundir import RunDir
from ftlib.runs import act, policy
from ftlib.runs.decide import EXIT_CANCELLED, Action, Nothing, Requeue, Stop
from ftlib.runs.diagnosis import Cause
from ftlib.runs.events import Cancelled, CheckpointSaved, ResumeRequested, Settled, Submitted
from ftlib.runs.folder import RunFolder
from ftlib.runs.policy import Life, decide
from ftlib.runs.scheduler import Here
from ftlib.slurm import attempt
from ftlib.slurm.investigate import investigator
from tests import policy_page
from tests.worlds import log

# -- what is done ------------------------------------------------------------------------------------------------------


def ended(cause: Cause, *, progressed: bool = False, times: int = 1) -> list[Life]:
    return [Life(cause, progressed)] * times


def test_preemption_is_free_while_the_run_gets_on() -> None:
    assert decide(ended("preemption", progressed=True, times=500), micro_batch=8).requeue


@pytest.mark.parametrize("cause", ["preemption", "time limit", "by hand"])
def test_but_not_for_ever_without_a_step(cause: Cause) -> None:
    assert decide(ended(cause, times=9), micro_batch=8).requeue
    assert not decide(ended(cause, times=10), micro_batch=8).requeue


def test_three_barren_lives_of_its_own_doing_stop_and_a_step_between_saves_it() -> None:
    assert not decide(ended("killed", times=3), micro_batch=8).requeue
    twice = [*ended("killed", times=2), *ended("preemption")]
    assert decide([*twice, *ended("killed", progressed=True)], micro_batch=8).requeue
    assert not decide([*twice, *ended("collective")], micro_batch=8).requeue


@pytest.mark.parametrize("cause", ["disk full", "input", "code", "idle GPU", "cancelled"])
def test_what_another_try_would_not_mend_stops_at_once(cause: Cause) -> None:
    decision = decide(ended(cause, progressed=True), micro_batch=8)
    assert not decision.requeue and policy.KINDS[cause].plain in decision.words


def test_the_wait_after_a_passing_fault_doubles_and_its_budget_ends() -> None:
    waits = [decide(ended("transient", progressed=True, times=n), micro_batch=8) for n in range(1, 7)]
    assert [w.backoff_s for w in waits[:5]] == [30, 60, 120, 240, 480]
    assert [w.requeue for w in waits] == [True] * 5 + [False]


def test_the_page_about_interruptions_says_what_the_policy_does() -> None:
    assert policy_page.PAGE.read_text(encoding="utf-8") == policy_page.page(), "python -m tests.policy_page writes it"


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
    plan = {"micro_batch": 8, "accumulation": 2, "stages": {"train": {"time_min": 60, "warning_s": 90}}}
    (folder / "plan.json").write_text(json.dumps(plan))
    on_cpu = {"train": StageNumerics(device="cpu", deterministic=True)}
    begun_with = Numerics(
        nodes=1, processes_per_node=1, micro_batch=8, accumulation=2, threads=1, compute_dtype="float32", stages=on_cpu
    )  # fmt: skip
    numerics.write(folder, begun_with)
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return RunDir(folder)


# sacct where there is no accounting, as shell.
ACCOUNTING_DISABLED = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


def row(start: int, state: str) -> str:
    """sacct's row of one start of job 7, as shell."""
    return f"echo '7|{state}|0:{9 if state == 'FAILED' else 0}|{start}|{start + 50}'"


def shim(run: RunDir, name: str, body: str) -> None:
    path = run.path.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


class Controller:
    """A controller that does not answer."""

    def state(self, job_id: str) -> str | None:
        return None

    def restarts(self, job_id: str) -> int | None:
        return 0

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        raise AssertionError

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        raise AssertionError


def life(
    run: RunDir, number: int, text: str = "", *, code: int = 1, outcome: str = "", rank: int = 0
) -> Action:
    """An attempt of the train stage begins, writes its log, and ends; what its epilogue decides."""
    file = run.slurm / "train" / f"7_{rank}_log.out"
    sizes = " ".join(f"{p.name}:{p.stat().st_size}" for p in file.parent.glob("7_*_log.out"))
    (run.lives / f"train-{number}").write_text(f"7 n1 {1_700_000_000 + 10 * number} {sizes}\n")
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
    if outcome:
        (run.outcomes / f"train-{number}").write_text(outcome + "\n")
    investigate = investigator(
        run.path, code=code, logs=file.parent, job_id="7", slurm="SLURM_JOB_ID" in os.environ
    )
    return act.end_attempt(run, Controller(), here(number, ended=True), investigate)


def here(number: int, *, ended: bool) -> Here:
    return Here(job_id="7", stage="train", attempt=number, ended=ended)


def changes(run: RunDir, action: Action) -> dict[str, str]:
    """What scontrol is told of the requeued job."""
    assert isinstance(action, Requeue)
    return attempt.changes_of(RunFolder(run.path), action)


def committed(run: RunDir, number: int, step: int) -> None:
    run.record(CheckpointSaved(stage="train", attempt=number, step=step), writer=f"train-{number}")


def causes(run: RunDir) -> list[str]:
    """Why its attempts ended, as it was settled."""
    return [settled.cause for settled in run.ledger().of(Settled)]


def test_gpu_memory_halves_the_micro_batch_to_one_and_keeps_the_global_batch(run: RunDir) -> None:
    seen = []
    for number in (1, 2, 3):
        committed(run, number, 10 * number)
        assert isinstance(life(run, number, log("gpu-oom")), Requeue)
        seen.append((run.numerics().micro_batch, run.numerics().accumulation))
    assert seen == [(4, 4), (2, 8), (1, 16)]
    committed(run, 4, 40)
    verdict = life(run, 4, log("gpu-oom"))
    assert isinstance(verdict, Stop) and "cannot be smaller" in verdict.message
    assert [change.value for change in run.ledger().overrides(time.time()).history] == [4, 2, 1]


def test_host_memory_asks_for_half_as_much_again_twice_at_most(run: RunDir) -> None:
    run.record(Submitted(stage="train", job_id="7", mem_mib=4000, node_mem_mib=100_000))
    committed(run, 1, 10)
    assert changes(run, life(run, 1, log("host-oom"), code=137)) == {"MinMemoryNode": "6000"}
    assert changes(run, life(run, 2, log("host-oom"), code=137)) == {"MinMemoryNode": "9000"}
    assert isinstance(life(run, 3, log("host-oom"), code=137), Stop)


def test_no_more_host_memory_is_asked_for_than_a_node_has(run: RunDir) -> None:
    run.record(Submitted(stage="train", job_id="7", mem_mib=4000, node_mem_mib=5120))
    assert changes(run, life(run, 1, log("host-oom"), code=137)) == {"MinMemoryNode": "5120"}


def test_the_owners_excluded_nodes_and_earlier_ones_stay_excluded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.provenance_file.write_text(json.dumps({"profile": {"exclude": "bad[1-2]"}}))
    for number, node in enumerate(("n1", "n2"), 1):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        verdict = life(run, number, log("ecc"))
    assert changes(run, verdict) == {"ExcNodeList": "bad[1-2],n1,n2"}


def test_a_bad_gpu_leaves_its_node_out_for_a_day(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    verdict = life(run, 1, log("ecc"))
    assert changes(run, verdict) == {"ExcNodeList": "n1"}
    (excluded,) = run.ledger().overrides(time.time()).history
    assert excluded.until and time.time() + 23 * 3600 < excluded.until < time.time() + 25 * 3600
    assert run.ledger().overrides(excluded.until - 60).excluded == ("n1",)
    assert run.ledger().overrides(excluded.until + 60).excluded == ()


def test_the_bad_gpu_of_another_rank_leaves_that_ranks_node_out(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    shim(run, "scontrol", 'test "$2" = hostnames && echo n1 && echo n2')
    assert changes(run, life(run, 1, log("ecc"), rank=3)) == {"ExcNodeList": "n2"}


def test_what_an_earlier_life_wrote_into_the_log_is_not_held_against_a_later_one(run: RunDir) -> None:
    committed(run, 1, 10)
    assert isinstance(life(run, 1, log("gpu-oom")), Requeue)
    life(run, 2, log("stale-nfs"))
    assert causes(run) == ["GPU memory", "transient"]


def test_a_person_who_resumes_begins_the_count_anew(run: RunDir) -> None:
    for number in (1, 2, 3):
        verdict = life(run, number, code=137)
    assert isinstance(verdict, Stop)
    run.record(Submitted(stage="train", job_id="8", after_attempt=3))
    assert isinstance(life(run, 4, code=137), Requeue)
    # The recovery job is no person.
    run.record(Submitted(stage="train", job_id="9", after_attempt=4, automatic=True))
    assert isinstance(life(run, 5, code=137), Requeue)
    assert isinstance(life(run, 6, code=137), Stop)


SAVED = "75 interrupted (preemption), saved at step 9"
LIMIT = "75 interrupted (time limit), saved at step 9"


@pytest.mark.parametrize(
    ("outcome", "sacct", "job", "cause"),
    [
        (SAVED, "RUNNING", "PreemptTime=1700000100 EndTime=9999999999", "preemption"),
        (SAVED, "RUNNING", "PreemptTime=None EndTime=9999999999", "by hand"),
        # Slurm 26.05 where nothing preempts.
        (SAVED, "RUNNING", "EndTime=9999999999", "by hand"),
        (SAVED, "REQUEUED", "", "by hand"),
        (SAVED, "PREEMPTED", "", "preemption"),
        (SAVED, "NODE_FAIL", "", "node failure"),
        (SAVED, "CANCELLED by 1000", "", "cancelled"),
        (LIMIT, "CANCELLED by 1000", "", "cancelled"),
        (LIMIT, "RUNNING", "PreemptTime=None EndTime=1700000000", "time limit"),
        (LIMIT, "RUNNING", "PreemptTime=None EndTime=9999999999", "by hand"),
        # Nobody answers.
        (SAVED, "", "", "unknown"),
        (LIMIT, "", "", "unknown"),
    ],
)
def test_the_sender_of_a_warning_is_found(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, outcome: str, sacct: str, job: str, cause: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    # Accounting lists every life of the job; this one is the second.
    rows = f"{row(1_600_000_000, 'PREEMPTED')}; {row(1_700_000_001, sacct)}"
    shim(run, "sacct", rows if sacct else ACCOUNTING_DISABLED)
    answer = f"echo 'JobId=7 JobState=RUNNING StartTime=1700000009 {job}'"
    shim(run, "scontrol", answer if job else "exit 1")
    life(run, 1, outcome=outcome)
    assert causes(run) == [cause]


def test_without_an_answer_a_job_of_two_stages_says_itself_when_it_ends(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's limit is the stage's own, and its attempt did not begin with the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("FT_ENDS", "9999999999")
    life(run, 1, outcome=LIMIT)
    monkeypatch.setenv("FT_ENDS", str(int(time.time()) + 100))
    life(run, 2, outcome=LIMIT)
    assert causes(run) == ["unknown", "time limit"]


def test_the_next_lifes_prologue_settles_what_no_epilogue_saw(run: RunDir) -> None:
    states = ("NODE_FAIL", "FAILED", "NODE_FAIL", "RUNNING")
    shim(run, "sacct", ";".join(row(1_700_000_000 + 10 * n, state) for n, state in enumerate(states, 1)))
    for number in (1, 2, 3, 4):
        (run.lives / f"train-{number}").write_text(f"7 n1 {1_700_000_000 + 10 * number} \n")
    # The SIGTERM with which Slurm clears a lost node looks like a preemption's to a process that still lives there.
    (run.outcomes / "train-3").write_text("75 interrupted (preemption), saved at step 2\n")
    for _ in range(2):
        begun = act.begin_attempt(run, Controller(), here(4, ended=False), investigator(run.path))
        assert isinstance(begun, Nothing) and not begun.superseded
    expected: list[Cause] = ["node failure", "killed", "node failure"]
    settled = run.ledger().of(Settled)
    assert [(one.attempt, one.cause, one.by) for one in settled] == [
        (number, cause, "prologue") for number, cause in enumerate(expected, 1)
    ]


def test_a_job_that_was_cancelled_as_it_ended_is_neither_requeued_nor_begun_again(run: RunDir) -> None:
    """`make cancel` in the second in which the epilogue requeues: Slurm may know the job as TIMEOUT, not CANCELLED."""
    run.record(Cancelled(stage="train", job_id="7"))
    verdict = life(run, 1, outcome=LIMIT)
    assert isinstance(verdict, Stop) and "was cancelled by its owner" in verdict.message
    (run.lives / "train-2").write_text("7 n1 1700000020 \n")
    begun = act.begin_attempt(run, Controller(), here(2, ended=False), investigator(run.path))
    assert isinstance(begun, Stop) and begun.code == EXIT_CANCELLED
    # What `make resume` queues has another job id.
    run.record(ResumeRequested(after_attempts={"train": 1}))
    resumed = Here(job_id="8", stage="train", attempt=2, ended=False)
    assert isinstance(act.begin_attempt(run, Controller(), resumed, investigator(run.path)), Nothing)


def test_a_requeue_whose_probe_was_not_answered_still_changes_the_next_attempt() -> None:
    """The controller falls silent for one call: its count of restarts tells that the job went back to the queue."""

    class Silent(Controller):
        restart_count = 0
        changed: Mapping[str, str] | None = None

        def restarts(self, job_id: str) -> int | None:
            return self.restart_count

        def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
            self.restart_count += 1
            return True

        def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
            if "Requeue" in changes:
                return False
            self.changed = changes
            return True

    controller = Silent()
    how = act.requeue(controller, "7", {"MinMemoryNode": "6000"}, restarts=0, report=lambda message: None)
    assert how == act.REQUEUED and controller.changed == {"MinMemoryNode": "6000"}
