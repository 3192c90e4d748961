"""What every test stands on: a clean environment, hard paths, and the list of what could not run and why."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cluster, schedule
from tests.cluster import slurm as slurm
from tests.seen import site as site
from tests.sweeps import checkout as checkout
from tests.sweeps import file as file
from tests.sweeps import login as login

# Under `make test` a test's own `make` must not take over the outer one's flags and variables.
for _name in [name for name in os.environ if name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS") or name.startswith("OPT_")]:
    del os.environ[_name]

# A Slurm command that finds no configuration asks DNS for one: 10 s for each where no name server answers.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

_REQUIRED = os.environ.get("REQUIRE", "").replace(",", " ").split()
# Reason -> tests. What whole files give as theirs every worker finds: it is counted once.
_skipped: Counter[str] = Counter()
_skipped_whole: Counter[str] = Counter()
_deselected: list[pytest.Item] = []
# Beside other tests on a busy machine, chains of jobs take a few times their minutes; pyproject.toml bounds the others.
SLURM_TEST_S = 1200
# The folder where workers tell the process above them which tests belong together.
GROUPS = "FTLIB_TEST_GROUPS"
DESELECTED = "not selected by -k, -m or --deselect"


@pytest.fixture
def odd_dir(tmp_path: Path) -> Path:
    """An empty folder whose name has a space, both quotes, a dollar and a newline."""
    path = tmp_path / "a b's \"c\" $d\ne"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _no_cluster_stays() -> Iterator[None]:
    """Commands that run in this process name their cluster in its environment: the next test has none."""
    before = os.environ.get("SLURM_CONF")
    yield
    os.environ.pop("SLURM_CONF", None)
    if before is not None:
        os.environ["SLURM_CONF"] = before


def pytest_addoption(parser: pytest.Parser) -> None:
    # The bare GPU machine has no pytest-timeout; pyproject.toml's settings for it are no mistake there.
    if importlib.util.find_spec("pytest_timeout") is None:
        for name in ("timeout", "timeout_method"):
            parser.addini(name, "of pytest-timeout, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        cluster.claim()
    else:  # this process has workers, and runs no test itself
        os.environ[GROUPS] = tempfile.mkdtemp(prefix="ftlib-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and getattr(config.option, "numprocesses", None):
        shutil.rmtree(os.environ[GROUPS])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    file = Path(os.environ[GROUPS], "groups.json")
    return schedule.scheduler(config, log, file) if config.option.dist == "loadgroup" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return schedule.workers(len(os.sched_getaffinity(0)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if schedule.on_slurm(item):
            item.add_marker(pytest.mark.slurm)
            if config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(SLURM_TEST_S))
    if hasattr(config, "workerinput"):
        left_out = "nightly" if "not nightly" in config.option.markexpr else None
        groups = schedule.arrange(items, left_out=left_out)
        part = Path(os.environ[GROUPS], f"{os.getpid()}")
        part.write_text(json.dumps(groups), encoding="utf-8")
        part.rename(part.with_name("groups.json"))  # every worker writes the same


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.extend(items)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _fail_skip(report: pytest.TestReport | pytest.CollectReport, needs: str) -> None:
    report.longrepr = f"not run, though REQUIRE={needs} asks for it: {_reason(report)}"
    report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        needs = next((name for name in _REQUIRED if item.get_closest_marker(name)), None)
        if needs:
            _fail_skip(report, needs)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where the list is written, reports come in from all workers."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[_reason(report)] += 1


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that skips itself whole has no items to look at: its text tells whether it holds tests of that mark."""
    report = yield
    if report.skipped:
        text = collector.path.read_text(encoding="utf-8") if collector.path.is_file() else ""
        needs = next((name for name in _REQUIRED if f"mark.{name}" in text), None)
        if needs:
            _fail_skip(report, needs)
        else:
            _skipped_whole[f"{_reason(report)} (all of {collector.nodeid})"] += 1
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended, and hands over what it alone knew. Every one of them has collected all tests."""
    for reason, count in getattr(node, "workeroutput", {}).get("not_run", {}).items():
        _skipped_whole[reason] = max(count, _skipped_whole[reason])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
    """Outermost, so that the list stands after pytest's own closing line: the last thing a person reads."""
    if _deselected:
        _skipped_whole[DESELECTED] = len(_deselected)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = dict(_skipped_whole)
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    if session.shouldstop or session.shouldfail or exitstatus not in (0, 1):
        reporter.write_line("The run was cut short: the list of what did not run is not whole.")
    not_run = _skipped + _skipped_whole
    reporter.write_line("Not run:" if not_run else "Not run: nothing.")
    for reason, count in sorted(not_run.items()):
        reporter.write_line(f"  {count} {'test' if count == 1 else 'tests'}: {reason}")
