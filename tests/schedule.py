"""Which tests run beside each other in `make test`, and which begin first.

`make test` starts more processes (pytest-xdist's workers) than there are cores, as tests of a real Slurm mostly wait:

- A test that asks for the fixture `slurm` belongs to a lane. A lane's tests run in one worker, one after the other, and
  each worker has a Slurm of its own (tests/cluster.py): no test meets the jobs, full queues or lost nodes of another.
- Tests that share a fixture of their module, class or session run in one worker, so that it is made once. Tests of one
  pytest.mark.xdist_group("name") do so, too.
- All others go one by one to whichever worker is free.

Lanes begin first, then the longest. A new test needs nothing: where it belongs follows from its fixtures. A module that
takes minutes is worth a line below.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

LANES = 2
# Seconds that a module's tests take on two quiet cores; measured with `make test ARGS="-n 0 --durations=0"`.
SLURM_SECONDS = {
    "test_chaos": 130,
    "test_chain": 170,
    "test_zero_slurm": 150,
    "test_sweep_slurm": 200,
    "test_smoke": 150,
    "test_diagnosis_slurm": 30,
    "test_cluster": 25,
    "test_sites": 10,
    "test_preflight": 5,
}
SECONDS = {
    "test_local_run": 110,
    "test_methods": 70,
    "test_sweep": 60,
}
# For each test of a module that is not listed: of Slurm, marked as slow, any other.
SLURM_TEST_S, SLOW_TEST_S, TEST_S = 30.0, 15.0, 0.5
# Fixtures that are made in a moment: no reason to keep the tests that share them in one worker.
CHEAP = frozenset({"checkout"})
HERE = Path(__file__).parent


def workers(cores: int) -> int:
    """How many processes `-n auto` is: one for each core, up to six, and one for each lane."""
    return min(cores, 6) + LANES


def arrange(items: list[pytest.Item], left_out: str | None = None) -> dict[str, str]:
    """Sort the tests: lanes, then the longest groups and tests. Changes `items`; returns node id -> group.

    `left_out` is the mark of tests that will be deselected: they take no time.
    """
    seconds = _seconds([item for item in items if not (left_out and item.get_closest_marker(left_out))])
    lanes = _lanes(items, seconds)
    groups = {item: group for item in items if (group := _group(item, lanes))}
    length: dict[str, float] = {}
    for item, group in groups.items():
        length[group] = length.get(group, 0) + seconds.get(item, 0)

    def place(item: pytest.Item) -> tuple[bool, float]:
        if on_slurm(item):
            # Within a lane the longest module comes first, too. Each stays together: its tests share fixtures.
            return False, -SLURM_SECONDS.get(_module(item), 0)
        return True, -length.get(groups.get(item, ""), seconds.get(item, 0))

    items.sort(key=place)
    return {item.nodeid: group for item, group in groups.items()}


def scheduler(config: pytest.Config, log: Any, groups_file: Path) -> Any:
    """Hands out groups, and tests of none one by one, in their order. Workers have written the file when it is read.

    xdist's own `--dist loadgroup` appends the group to the node id, in an attribute that pytest 9.2 does not read: it
    would ignore all groups.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        groups: dict[str, str] | None = None

        def _split_scope(self, nodeid: str) -> str:
            if self.groups is None:
                self.groups = json.loads(groups_file.read_text(encoding="utf-8"))
            return self.groups.get(nodeid, nodeid)

    return ByGroup(config, log)



def on_slurm(item: pytest.Item) -> bool:
    """Whether a test runs on the local Slurm."""
    return "slurm" in getattr(item, "fixturenames", ())


def _module(item: pytest.Item) -> str:
    return Path(item.path).stem


def _group(item: pytest.Item, lanes: dict[str, int]) -> str:
    """The tests that one worker must run: a lane or a module. Empty where any worker will do."""
    if on_slurm(item):
        return f"slurm-{lanes[_module(item)]}"
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0])
    return _module(item) if _shares_a_fixture(item) else ""


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Whether a fixture of ours that it uses, other than a cheap one, serves more tests than this."""
    if not isinstance(item, pytest.Function):
        return False
    for name, definitions in item._fixtureinfo.name2fixturedefs.items():
        ours = Path(definitions[-1].func.__code__.co_filename).is_relative_to(HERE)
        if ours and name not in CHEAP and definitions[-1].scope != "function":
            return True
    return False


def _seconds(items: list[pytest.Item]) -> dict[pytest.Item, float]:
    """What each test is expected to take: a listed module's time is shared out to its tests."""
    counts = Counter((_module(item), on_slurm(item)) for item in items)
    seconds = {}
    for item in items:
        module, slurm = _module(item), on_slurm(item)
        known = (SLURM_SECONDS if slurm else SECONDS).get(module)
        if known is not None:
            seconds[item] = known / counts[module, slurm]
        elif slurm:
            seconds[item] = SLURM_TEST_S
        else:
            seconds[item] = SLOW_TEST_S if item.get_closest_marker("slow") else TEST_S
    return seconds


def _lanes(items: list[pytest.Item], seconds: dict[pytest.Item, float]) -> dict[str, int]:
    """The lane of each module that has tests of Slurm: the longest first, each to the lane with the least so far."""
    length: Counter[str] = Counter()
    for item in items:
        if on_slurm(item):
            length[_module(item)] += seconds.get(item, 0)  # type: ignore[assignment]
    filled = [0.0] * LANES
    lanes = {}
    for module, taken in length.most_common():
        lanes[module] = min(range(LANES), key=lambda lane: filled[lane])
        filled[lanes[module]] += taken
    return lanes
