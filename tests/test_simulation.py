"""The simulation: single histories that once failed, kills at every operation, and many random histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

pytest.importorskip("greenlet", reason="greenlet is not installed (make test installs it)")

from benchmarks.simulate import driver
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
