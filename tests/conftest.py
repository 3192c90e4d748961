"""What every test stands on: a clean environment, hard paths, and the list of what could not run and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.cluster import slurm as slurm
from tests.seen import site as site
from tests.sweeps import checkout as checkout
from tests.sweeps import file as file
from tests.sweeps import login as login

# Under `make test` a test's own `make` must not take over the outer one's flags and variables.
for _name in [name for name in os.environ if name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS") or name.startswith("OPT_")]:
    del os.environ[_name]

_REQUIRED = os.environ.get("REQUIRE", "").replace(",", " ").split()
_not_run: Counter[str] = Counter()
_deselected: list[pytest.Item] = []


@pytest.fixture
def odd_dir(tmp_path: Path) -> Path:
    """An empty folder whose name has a space, both quotes, a dollar and a newline."""
    path = tmp_path / "a b's \"c\" $d\ne"
    path.mkdir()
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.extend(items)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
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
        else:
            _not_run[_reason(report)] += 1
    return report


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
            _not_run[f"{_reason(report)} (all of {collector.nodeid})"] += 1
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
    """Outermost, so that the list stands after pytest's own closing line: the last thing a person reads."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    if session.shouldstop or session.shouldfail or exitstatus not in (0, 1):
        reporter.write_line("The run was cut short: the list of what did not run is not whole.")
    if _deselected:
        _not_run["not selected by -k, -m or --deselect"] = len(_deselected)
    reporter.write_line("Not run:" if _not_run else "Not run: nothing.")
    for reason, count in sorted(_not_run.items()):
        reporter.write_line(f"  {count} {'test' if count == 1 else 'tests'}: {reason}")
