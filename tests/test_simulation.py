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
