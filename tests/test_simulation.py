"""The simulation: single histories that once failed, kills at every operation, and many random histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

pytest.importorskip("greenlet", reason="greenlet is not installed (make test installs it)")

from benchmarks.simulate import coverage, driver, many, planted
from benchmarks.simulate.driver import History, Injection, Result
from benchmarks.simulate.slurm import Site
from benchmarks.simulate.world import Scenario
from ftlib.runs import act

LAYOUTS = {len(layout): layout for layout in driver.LAYOUTS}
NO_REQUEUE = Site(may_requeue=False)


def happen(*injections: Injection, scenario: Scenario | None = None, site: Site | None = None) -> Result:
    """One history, of which every invariant must hold."""
    world = scenario or Scenario(site=site or Site())
    result = driver.run(History(0, world, injections), tracing=True)
    assert not result.violations, "\n".join([*result.trace[-60:], *map(str, result.violations)])
    return result


def at(seconds: float, kind: str, *, detail: str = "", lasting: float = 60.0) -> Injection:
    return Injection(kind, at_s=seconds, detail=detail, seconds=lasting)


def on(role: str, operation: int, kind: str, *, detail: str = "", lasting: float = 60.0) -> Injection:
    return Injection(kind, role=role, operation=operation, detail=detail, seconds=lasting)


# -- every process is killed at each of its operations -----------------------------------------------------------------

# Role -> its operations in one history, what else happens in it, and how it must end.
DIES = at(3000, "die", detail="collective")
KILLED: Mapping[str, tuple[int, tuple[Injection, ...], tuple[str, ...]]] = {
    "submit": (36, (), ("completed",)),
    "attempt": (30, (), ("completed",)),
    "batch": (16, (), ("completed",)),
    "epilogue": (14, (DIES,), ("completed",)),
    "prologue": (4, (DIES,), ("completed",)),
    "cancel": (14, (at(3000, "cancel"),), ("cancelled",)),
    "resume": (40, (at(3000, "cancel"), at(6000, "resume")), ("completed",)),
}


@pytest.mark.parametrize("role", KILLED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("may_requeue", [True, False])
def test_a_process_may_be_killed_at_any_operation(role: str, layout: int, may_requeue: bool) -> None:
    count, others, ends = KILLED[role]
    scenario = Scenario(site=Site(may_requeue=may_requeue), jobs=LAYOUTS[layout])
    for operation in range(1, count + 1):
        result = happen(*others, on(role, operation, "kill"), scenario=scenario)
        assert result.end in ends, (operation, result.end)


@pytest.mark.parametrize("kind", ["controller", "lose answer", "late sbatch", "cancel", "node"])
def test_anything_may_happen_at_any_operation_of_the_recovery_job(kind: str) -> None:
    shell = at(3000, "kill batch")
    for operation in range(1, 29):
        result = happen(on("recovery", operation, kind), shell)
        assert result.end == ("cancelled" if kind == "cancel" else "completed"), operation


# -- single histories that once failed ---------------------------------------------------------------------------------


class _Deaf:
    """A controller of Slurm 22.05: it accepts `requeue Incomplete` of a job that has ended, and does nothing."""

    def __init__(self) -> None:
        self.plain: int = 0

    def state(self, job_id: str) -> str | None:
        return "COMPLETING"

    def restarts(self, job_id: str) -> int | None:
        return 0

    def requeue(self, job_id: str, *, incomplete_only: bool) -> bool:
        self.plain += not incomplete_only
        return True

    def update(self, job_id: str, changes: Mapping[str, str]) -> bool:
        return False


def test_a_requeue_that_slurm_accepts_without_effect_is_noticed_and_not_forced() -> None:
    controller, lines = _Deaf(), list[str]()
    report: Callable[[str], None] = lines.append
    assert act.requeue(controller, "7", {}, report=report, sleep=lambda _: None) == "refused"
    assert controller.plain == 0 and lines


def test_a_run_is_cancelled_between_its_job_and_the_recovery_job() -> None:
    result = happen(at(2000, "cancel"), DIES, site=Site(may_requeue=False, queue_wait_s=7200.0))
    assert result.end == "cancelled"


def test_an_adopted_job_is_no_request_of_the_owner() -> None:
    """The budget of a cause is not renewed because an answer of sbatch was lost."""
    scenario = Scenario(site=NO_REQUEUE, fitting_micro_batch=0)
    result = happen(on("recovery", 9, "lose answer"), on("recovery", 10, "kill"), scenario=scenario)
    assert result.end in ("failed", "abandoned")


def test_a_job_that_reached_slurm_late_does_not_start_a_cancelled_run() -> None:
    """sbatch timed out, another call took its place, the owner cancelled: the first job asks before attempt 1, too."""
    site = Site(queue_wait_s=600.0)
    result = happen(at(0, "late sbatch"), at(50, "cancel"), site=site)
    assert result.end == "cancelled"


def test_an_epilogue_on_a_lost_node_leaves_the_next_start_of_its_job_alone() -> None:
    """It still tried to requeue the job while that ran again elsewhere."""
    site = Site(requeue_wait_s=10.0, incomplete_is_always_accepted=False)
    result = happen(DIES, on("epilogue", 10, "zombie", lasting=600.0), site=site)
    causes = [line.split(" found out: ")[1] for line in result.trace if " found out: " in line]
    assert [cause.split(" (")[0] for cause in causes] == ["train-1 ended by collective"]


@pytest.mark.parametrize("accounting", ["disabled", "answered"])
def test_what_ends_a_start_in_its_prologue_is_no_cause_of_the_attempt_before(accounting: str) -> None:
    """Both write into the log of the job, and the prologue had no attempt yet."""
    lost, taken = at(4000, "zombie", lasting=4000.0), on("prologue", 10, "preempt")
    result = happen(lost, taken, site=Site(accounting=accounting))
    assert result.end == "completed"


def test_an_attempt_that_ends_before_accounting_has_its_start_was_not_requeued_by_hand() -> None:
    """Accounting's newest row was of the start before, which our own epilogue had requeued."""
    result = happen(at(1, "storm"), site=Site(accounting_late_s=60.0))
    assert result.end == "failed"


def test_a_job_that_reached_slurm_late_leaves_also_where_an_earlier_submission_was_refused() -> None:
    """The refused one's intent stays open, and the late job was taken for its."""
    site = Site(queue_wait_s=600.0)
    happen(on("submit", 1, "refuse"), at(426, "late sbatch"), site=site)


# -- many random histories ---------------------------------------------------------------------------------------------

# In `make test`: so many histories in so many tests, which run beside each other. `make simulate` runs more, of others.
HISTORIES, PARTS = 2000, 10
FIRST_SEED = 10_000_000


@pytest.mark.parametrize("part", range(PARTS))
def test_random_histories_violate_no_invariant(part: int) -> None:
    size = HISTORIES // PARTS
    _, ends, failures = many.run_chunk((FIRST_SEED + part * size, size))
    assert not failures, f"python -m benchmarks.simulate --shrink --seed {min(failures)}: {failures}"
    assert ends.keys() >= {"completed", "failed", "cancelled"}


def test_a_run_of_many_histories_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state.json"
    half = many.State.read(state)
    half.done.add(0)
    half.write(state)
    assert many.run(histories=2 * many.CHUNK, first=0, workers=1, state_file=state) == 0
    lines = capsys.readouterr().out
    assert "50 of 100 histories ran before" in lines and "no invariant was violated" in lines
    assert not state.exists()


def test_after_a_change_all_histories_count_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = many.State.read(tmp_path / "state.json")
    state.done.add(0)
    state.write(tmp_path / "state.json")
    assert many.State.read(tmp_path / "state.json").done == {0}
    monkeypatch.setattr(many, "SOURCES", ("ftlib/runs",))
    assert not many.State.read(tmp_path / "state.json").done


def test_a_failure_is_printed_with_its_seed_and_fewest_injections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with planted.planted("nobody claims the run"):
        seed = (planted.search("nobody claims the run", most=2000) or (0, ""))[0] - 1
        assert many.run(histories=1, first=seed, workers=1, state_file=tmp_path / "state.json") == 1
    text = capsys.readouterr().out
    assert "never two jobs for one stage" in text and f"seed {seed}" in text and "INJECTED" in text


# Statements of the reducer that these histories do not reach, with the reason; tests/test_decide.py has an example of
# each.
NOT_REACHED = {
    # The simulated Slurm starts no job before the one that it waits for is done.
    "return later",
    "return Nothing(message=f'{at_work} was cancelled and is still saving', cause='cancelled', stage=at_w",
    # The shell has looked for a later attempt, or for the stage's end, a moment before.
    "return _nothing(here, 'a later attempt has taken over', superseded=True)",
    "return _nothing(here, f'{stage} is done')",
    # A run that is cancelled in the middle of its first submission, and whose stage is done all the same.
    "return Nothing(message=f'{stage} was cancelled by its owner', cause='cancelled', stage=stage, over=T",
    # Where requeueing is forbidden, host memory runs out in a job that was adopted: one history in some thousands.
    "return 0",
}  # fmt: skip
# Of the random histories some that reach what few do. After a change of the simulation others may.
SELDOM = (10_000_551, 10_001_001, 10_001_372, 10_002_056)


def test_random_histories_reach_every_statement_of_the_reducer() -> None:
    """And with that every kind of action, each of which has its own statements."""
    with coverage.watched() as reached:
        for seed in (*range(FIRST_SEED, FIRST_SEED + 400), *SELDOM):
            driver.run(driver.history_of(seed))
    assert len(reached.statements) > 150 and len(reached.ran) > 140
    assert set(reached.missed.values()) <= NOT_REACHED, reached.missed


# -- planted bugs ------------------------------------------------------------------------------------------------------

# Bug -> a history that finds it, by its seed. `python -m benchmarks.simulate --planted all` finds others after a change
# of the simulation.
FINDS: Mapping[str, int] = {
    "a plain requeue instead of Incomplete and a probe": 296,
    "a superseded job is not noticed": 70,
    "the prologue forgets a cancellation": 604,
    "a job is queued without an intent": 54,
    "jobs are adopted by the run's name": 1979,
    "nobody claims the run": 28,
    "an override does not say of which end it is": 0,
    "budgets ignore the owner's requests": 17,
    "budgets begin anew with every job": 266,
    "PREEMPTED counts as active": 70,
    "a cancellation by Slurm is taken for the owner's": 51,
    "a scheduler that is silent has ended all jobs": 1141,
    "an adopted job is taken for a request of the owner's": 642,
    "an epilogue requeues whatever runs under its job's id": 1018,
    "the first attempt begins unasked": 314,
    "a log is read beyond the end of the attempt's start": 279,
}


@pytest.mark.parametrize("bug", FINDS)
def test_a_planted_bug_is_found(bug: str) -> None:
    history = driver.history_of(FINDS[bug])
    assert not driver.run(history).violations
    with planted.planted(bug):
        assert driver.run(history).violations


def test_every_planted_bug_has_its_history() -> None:
    assert FINDS.keys() == planted.BUGS.keys() and len(FINDS) >= 10


@pytest.mark.nightly
@pytest.mark.parametrize("bug", FINDS)
def test_a_planted_bug_is_found_by_chance(bug: str) -> None:
    assert planted.search(bug, first=20_000_000, most=20_000) is not None
