"""Rules that the tests keep: no wait without a bound, and a place in the schedule that follows from their fixtures."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import schedule
from tests.processes import started

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("*.py")), *sorted((HERE.parent / "benchmarks" / "chaos").glob("*.py"))]
# Its process has a group of its own, which each of its tests ends.
ENDED = ("test_gpu_check.py", "processes.py")
RUNS = ("run", "check_output", "check_call", "call")


def unbounded(source: str) -> Iterator[tuple[int, str]]:
    """(line, what it is) of each call that may wait without end."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, node.func.value
        of_subprocess = isinstance(owner, ast.Name) and owner.id == "subprocess"
        bounded = any(keyword.arg in ("timeout", "timeout_s", None) for keyword in node.keywords)
        if of_subprocess and name in RUNS and not bounded:
            yield node.lineno, f"subprocess.{name} without a timeout"
        elif of_subprocess and name == "Popen":
            yield node.lineno, "subprocess.Popen: take tests.processes.started, which ends what a failing test leaves"
        elif name in ("communicate", "wait", "join") and not node.args and not bounded:
            yield node.lineno, f"{name}() without a timeout"


def test_no_test_waits_without_a_bound() -> None:
    found = [
        f"{path.relative_to(HERE.parent)}:{line}: {what}"
        for path in FILES
        for line, what in unbounded(path.read_text(encoding="utf-8"))
        if not (path.name in ENDED and "Popen" in what)
    ]
    assert found == []


@pytest.mark.parametrize(
    "call", ["subprocess.run(['a'])", "subprocess.Popen(['a'])", "p.communicate()", "p.wait()", "thread.join()"]
)
def test_a_wait_without_a_bound_is_found(call: str) -> None:
    assert len(list(unbounded(call))) == 1
    assert list(unbounded("subprocess.run(['a'], timeout=3); p.wait(3); ', '.join(b); p.communicate(timeout=3)")) == []


@pytest.mark.parametrize("session", [False, True])
def test_a_process_that_a_failing_test_leaves_is_ended(session: bool) -> None:
    with (
        pytest.raises(AssertionError, match="it failed"),
        started(["sh", "-c", "sleep 100 & wait"], stdout=subprocess.PIPE, start_new_session=session) as process,
    ):
        raise AssertionError("it failed")
    assert process.returncode == -signal.SIGKILL


def test_a_process_can_be_interrupted_although_the_suite_ignores_it() -> None:
    """As where the suite was started in the background: SIGINT is ignored, and what it starts inherits that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(100)"]
        with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) in (1, -signal.SIGINT, 130)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_test_that_hangs_ends_in_its_time(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import subprocess\ndef test_hangs(): subprocess.run(['sleep', '100'])\ndef test_next(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=2", "test_it.py"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert "1 failed, 1 passed" in done.stdout and time.monotonic() - began < 60


def test_the_settings_bound_every_test(pytestconfig: pytest.Config) -> None:
    assert 0 < float(pytestconfig.getini("timeout")) <= 600
    assert pytestconfig.getini("timeout_method") == "signal"
    assert float(pytestconfig.getini("faulthandler_timeout")) > 0
    assert pytestconfig.getini("faulthandler_exit_on_timeout")


# -- the schedule ------------------------------------------------------------------------------------------------------


SAMPLE = """
import pytest
@pytest.fixture(scope="module")
def costly(): pass
@pytest.fixture
def light(): pass
def test_of_slurm(slurm): pass
def test_shares(costly): pass
def test_shares_too(costly): pass
def test_alone(light): pass
@pytest.mark.slow
def test_slow(tmp_path_factory): pass
@pytest.mark.xdist_group("mine")
def test_marked(): pass
"""
SCHEDULED = """
import os, sys
from pathlib import Path
import pytest
sys.path.insert(0, {root!r})
from tests import schedule
schedule.HERE = Path(__file__).parent
FILE = Path(__file__).with_name("groups.json")
@pytest.fixture(scope="session")
def slurm(): pass
def pytest_collection_modifyitems(items):
    groups = schedule.arrange(items)
    part = FILE.with_name(str(os.getpid()))
    part.write_text(schedule.json.dumps(groups))
    part.rename(FILE)
    print(*("PLACE " + item.name + " " + groups.get(item.nodeid, "") for item in items), sep=chr(10))
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return schedule.scheduler(config, log, FILE)
"""


def sample(folder: Path, *words: str) -> str:
    """What pytest says of the sample, with the schedule of these tests."""
    (folder / "test_sample.py").write_text(SAMPLE)
    (folder / "test_other.py").write_text("def test_of_slurm_too(slurm): pass\n")
    (folder / "conftest.py").write_text(SCHEDULED.format(root=str(HERE.parent)))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120).stdout


def test_groups_follow_from_fixtures_and_the_longest_begin_first(tmp_path: Path) -> None:
    said = sample(tmp_path, "--collect-only", "-q")
    lines = [line.removeprefix("PLACE ").strip() for line in said.splitlines() if line.startswith("PLACE ")]
    assert sorted(lines[:2]) == ["test_of_slurm slurm-1", "test_of_slurm_too slurm-0"], said
    assert lines[2:5] == ["test_slow", "test_shares test_sample", "test_shares_too test_sample"]
    assert sorted(lines[5:]) == ["test_alone", "test_marked mine"]


def test_one_worker_runs_a_whole_group_and_lanes_go_to_two(tmp_path: Path) -> None:
    """That the installed pytest and xdist do as the schedule says."""
    said = sample(tmp_path, "-v", "-n", "2")
    worker = {test: gateway for gateway, test in re.findall(r"\[(gw\d)\].* PASSED \S*::(\w+)", said)}
    assert len(worker) == 7, said
    assert worker["test_of_slurm"] != worker["test_of_slurm_too"]
    assert worker["test_shares"] == worker["test_shares_too"]


def test_workers_are_the_cores_and_the_lanes() -> None:
    assert schedule.workers(2) == 2 + schedule.LANES and schedule.workers(64) < 12
