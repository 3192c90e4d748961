"""The front door hands on what it was given, the locks are whole, and a set-up is never taken for more than it is."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import started

ROOT = Path(__file__).parent.parent
LOCKS = [ROOT / "env" / name for name in ("login.lock", "train.lock", "deepspeed.lock", "dev.lock")]
VALUES = ["MODEL", "DATA", "CLUSTER", "SET", "RUN", "STAGE", "SWEEP", "NODES"]
FLAGS = ["DRY_RUN", "NEW", "JSON", "FOLLOW", "WATCH"]
VARIABLES = [*VALUES, *FLAGS, "VENV", "PYTHON", "ARGS"]
ENTRY = re.compile(r"^([a-z0-9._-]+)==(\S+)", re.MULTILINE | re.IGNORECASE)


def pins(*locks: Path) -> dict[str, str]:
    """Package name to version, of all the locks' entries."""
    return {name.lower(): version for lock in locks for name, version in ENTRY.findall(lock.read_text())}


class Checkout:
    """The Makefile in a folder of its own; its Python prints its argv, its set-up the stage it is for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "env", folder / "env", ignore=shutil.ignore_patterns("local_slurm"))
        (folder / "env" / "setup.sh").write_text('echo "stage $1" >&2\n')
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        program = "import json, sys; 'packages' in sys.argv and sys.exit(3); print(json.dumps(sys.argv[1:]))"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{program}" "$@"\n')
        python.chmod(0o755)

    def make(self, *args: str, **env: str) -> tuple[list[str], list[str]]:
        """Run make; the argv that its Python got, and the set-up stages that it asked for."""
        env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | env
        done = subprocess.run(["make", *args], cwd=self.folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        stages = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("stage ")]
        return json.loads(done.stdout.splitlines()[-1]), stages


@pytest.fixture
def checkout(odd_dir: Path) -> Checkout:
    return Checkout(odd_dir)


@pytest.mark.parametrize(
    "value",
    ["a.b=c", "a.b='x y' ", 'it\'s "q"', "$HOME $(HOME) $$ ${X `id`", "a\\ b\\", "two\nlines", "#no, (rem", "-x", "*"],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_value_reaches_the_command_line_word_for_word(checkout: Checkout, value: str, way: str) -> None:
    argv, _ = checkout.make("plan", f"SET={value}") if way == "argument" else checkout.make("plan", SET=value)
    assert argv == ["-m", "jobs", "plan", f"--set={value}"]


def test_every_variable_is_the_option_of_its_name(checkout: Checkout) -> None:
    argv, _ = checkout.make("submit", *(f"{name}=v {name}" for name in VALUES), *(f"{name}=1" for name in FLAGS))
    values = [f"--{name.lower()}=v {name}" for name in VALUES]
    assert argv == ["-m", "jobs", "submit", *values, "--dry-run", "--new", "--json", "--follow", "--watch"]


def test_what_is_empty_or_off_is_not_passed(checkout: Checkout) -> None:
    argv, _ = checkout.make("submit", "MODEL=", "DRY_RUN=0", "NEW=", JSON="0")
    assert argv == ["-m", "jobs", "submit"]


@pytest.mark.parametrize(
    ("args", "stages"),
    [
        (["submit"], ["login", "train"]),
        (["smoke"], ["login", "train"]),
        (["submit", "DRY_RUN=1"], ["login"]),
        (["submit", "DRY_RUN=0"], ["login", "train"]),
        (["test"], ["login", "train", "dev"]),
        *(([target], ["login"]) for target in ("status", "plan", "logs", "cancel", "resume", "schema")),
    ],
)
def test_a_target_sets_up_no_more_than_it_needs(checkout: Checkout, args: list[str], stages: list[str]) -> None:
    # A second make asks again for what this set-up, which does nothing, has left undone.
    assert list(dict.fromkeys(checkout.make(*args)[1])) == stages


def test_an_environment_is_made_only_where_the_site_allows_it(checkout: Checkout) -> None:
    (checkout.folder / "env" / "setup.sh").write_text('echo "stage $1" >&2; : > "$3"\n')
    python = checkout.folder / ".venv" / "bin" / "python"
    works = python.read_text()
    python.write_text("#!/bin/sh\n[ \"$4\" != --before ] || { echo 'the checkout is in your home' >&2; exit 64; }\n")
    done = subprocess.run(["make", "env"], cwd=checkout.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "the checkout is in your home" in done.stderr and "stage train" not in done.stderr
    python.write_text(works)
    assert checkout.make("env", "CLUSTER=x") == (["-m", "jobs", "env", "--cluster=x"], ["train"])


def test_after_an_unfinished_set_up_no_stamp_counts(checkout: Checkout) -> None:
    stages = ["login", "train", "dev"]
    (checkout.folder / "env" / "setup.sh").write_text('echo "stage $1" >&2; : > "$3"\n')
    assert checkout.make("test")[1] == stages
    assert checkout.make("test")[1] == []
    (checkout.folder / ".venv" / "setup.log").touch()
    assert checkout.make("test")[1] == stages


def test_a_changed_lock_is_installed(checkout: Checkout) -> None:
    (checkout.folder / "env" / "setup.sh").write_text('echo "stage $1" >&2; : > "$3"\n')
    assert checkout.make("test")[1] == ["login", "train", "dev"]
    with (checkout.folder / "env" / "torch.txt").open("a") as file:
        file.write("# newer\n")
    assert checkout.make("test")[1] == ["train"]


def test_pytest_gets_its_own_arguments(checkout: Checkout) -> None:
    beside = ["-m", "pytest", "-n", "auto", "--dist", "loadgroup", "--no-loadscope-reorder"]
    assert checkout.make("test", "ARGS=-x -k 'a or b'")[0] == [*beside, "-x", "-k", "a or b"]
    assert checkout.make("test-all", "ARGS=-n 0")[0] == [*beside, "-m", "", "-n", "0"]


def test_help_lists_every_target() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    lines = [line.split(maxsplit=1) for line in said.splitlines()[1:]]
    assert sorted(target for target, _ in lines) == sorted(phony[1].split())


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_package_has_hashes_and_no_lock_names_a_host(lock: Path) -> None:
    text = lock.read_text()
    entries = re.split(r"^(?=[a-z0-9._-]+==)", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    assert entries
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert re.findall(r"https?://\S+|--(?:extra-)?index-url\S*|--find-links\S*| @ \S+", text) == []


def test_no_lock_holds_torch_or_its_cuda() -> None:
    held = [name for name in pins(*LOCKS) if re.match(r"torch$|triton$|nvidia-|cuda-", name)]
    assert held == ["nvidia-ml-py"]  # plain Python, and no part of CUDA: it asks the driver


def test_the_locks_hold_the_pins_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    asked = dict(re.findall(r'"([A-Za-z0-9._-]+)==([^;"]+)', text))
    locked = pins(*LOCKS) | pins(ROOT / "env" / "torch.txt")
    assert len(asked) == 14
    assert {name: locked.get(name) for name in asked} == asked


def test_locks_that_share_a_package_agree_on_its_version() -> None:
    for lock in LOCKS:
        mine = pins(lock)
        assert {name: version for name, version in pins(*LOCKS).items() if name in mine} == mine


class TestSetUp:
    """env/setup.sh itself, with a pip that does as it is told: the folder is the only thing that is not real."""

    @pytest.fixture
    def venv(self, odd_dir: Path) -> Path:
        (odd_dir / "env").mkdir()
        shutil.copy(ROOT / "env" / "setup.sh", odd_dir / "env")
        venv = odd_dir / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=300)
        pip = next(venv.glob("lib/python*/site-packages")) / "pip"
        pip.mkdir()
        (pip / "__init__.py").touch()
        (pip / "__main__.py").write_text("import os\nexec(os.environ['PIP_DOES'])\n")
        return venv

    def set_up(self, venv: Path, pip_does: str, stage: str = "login", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "env/setup.sh", stage, ".venv", f".venv/.{stage}-2"],
            cwd=venv.parent, env=os.environ | {"PIP_DOES": pip_does} | env, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip

    def test_only_a_whole_one_leaves_a_stamp_and_an_old_stamp_goes(self, venv: Path) -> None:
        (venv / ".login-1").touch()
        failed = self.set_up(venv, "raise SystemExit('ERROR: No space left on device')")
        assert failed.returncode == 69 and list(venv.glob(".login-*")) == []
        assert "No space left on device" in failed.stderr and "same command again" in failed.stderr
        assert self.set_up(venv, "pass").returncode == 0
        assert [path.name for path in venv.glob(".login-*")] == [".login-2"]
        assert not list(venv.glob("setup.*"))

    def test_one_that_was_cut_while_changing_files_is_made_anew(self, venv: Path) -> None:
        (venv / "half").touch()
        self.set_up(venv, "print('Installing collected packages: x'); raise SystemExit(1)")
        again = self.set_up(venv, "", PYTHON="/bin/false")
        assert "made anew" in again.stderr and not (venv / "half").exists()
        assert again.returncode == 69 and "PYTHON=/bin/false does not run" in again.stderr

    def test_one_that_failed_before_keeps_what_was_there(self, venv: Path) -> None:
        (venv / "whole").touch()
        self.set_up(venv, "raise SystemExit('ERROR: no network')")
        assert self.set_up(venv, "pass").returncode == 0 and (venv / "whole").exists()

    def test_a_second_one_at_the_same_time_waits_for_its_user(self, venv: Path) -> None:
        with started(["sh", "-c", "read line", "env/setup.sh"], stdin=subprocess.PIPE) as other:
            (venv / "setup.pid").write_text(f"{os.uname().nodename} {other.pid}\n")
            second = self.set_up(venv, "pass")
        assert second.returncode == 69 and f"process {other.pid}" in second.stderr
        assert self.set_up(venv, "pass").returncode == 0

    def test_a_folder_of_something_else_is_left_alone(self, venv: Path) -> None:
        (venv / "pyvenv.cfg").unlink()
        refused = self.set_up(venv, "pass")
        assert refused.returncode == 69 and "other content" in refused.stderr and (venv / "bin").exists()


BESIDE = ("-n", "2", "--dist", "loadgroup")


class TestWhatCouldNotRun:
    """The list at the end of a test run, and REQUIRE; in one process and in several."""

    TESTS = """
import pytest
def test_runs(): pass
@pytest.mark.gpu
def test_gpu(): pytest.skip("no NVIDIA GPU")
@pytest.mark.slurm
def test_slurm(): pytest.skip("no Slurm")
@pytest.fixture
def slurm(): pytest.skip("no cluster")
def test_marked_by_its_fixture(slurm): pass
"""
    WHOLE_FILE = """
import pytest
pytestmark = pytest.mark.slurm
pytest.skip("no sbatch", allow_module_level=True)
"""

    def run(self, folder: Path, *args: str, require: str = "") -> tuple[int, str]:
        tests = folder / "tests"
        tests.mkdir()
        for name in ("cluster.py", "schedule.py"):
            shutil.copy(ROOT / "tests" / name, tests)
        # Without the fixtures that need the project itself.
        text = (ROOT / "tests" / "conftest.py").read_text()
        (tests / "conftest.py").write_text(re.sub(r"from tests\.(seen|sweeps) import .*\n", "", text))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (tests / "test_a.py").write_text(self.TESTS)
        (tests / "test_b.py").write_text(self.WHOLE_FILE)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
        env = os.environ | {"REQUIRE": require, "FTLIB_SLURM_DIR": str(folder / "slurm")}
        for variable in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            env.pop(variable, None)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout

    @pytest.mark.parametrize("workers", [(), BESIDE], ids=["one process", "two"])
    def test_the_last_lines_say_what_did_not_run_and_why(self, odd_dir: Path, workers: tuple[str, ...]) -> None:
        code, said = self.run(odd_dir, *workers)
        assert code == 0
        assert said.splitlines()[-5:] == [
            "Not run:",
            "  1 test: no NVIDIA GPU",
            "  1 test: no Slurm",
            "  1 test: no cluster",
            "  1 test: no sbatch (all of tests/test_b.py)",
        ]

    @pytest.mark.parametrize("workers", [(), BESIDE], ids=["one process", "two"])
    def test_what_was_not_selected_is_said_too(self, odd_dir: Path, workers: tuple[str, ...]) -> None:
        _, said = self.run(odd_dir, *workers, "-k", "runs", "tests/test_a.py")
        assert said.splitlines()[-2:] == ["Not run:", "  3 tests: not selected by -k, -m or --deselect"]

    def test_a_run_that_was_cut_short_says_so(self, odd_dir: Path) -> None:
        _, said = self.run(odd_dir, "-x", require="slurm")
        assert "The run was cut short" in said

    @pytest.mark.parametrize("workers", [(), BESIDE], ids=["one process", "two"])
    def test_a_required_test_that_did_not_run_is_a_failure(self, odd_dir: Path, workers: tuple[str, ...]) -> None:
        code, said = self.run(odd_dir, *workers, require="slurm")
        assert code != 0
        for reason in ("no Slurm", "no cluster", "no sbatch"):
            assert f"not run, though REQUIRE=slurm asks for it: {reason}" in said
        assert said.splitlines()[-2:] == ["Not run:", "  1 test: no NVIDIA GPU"]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "benchmarks").glob("[a-z]*.py"))])
def test_every_benchmark_can_be_begun(name: str) -> None:
    pytest.importorskip("psutil", reason="the training packages are not installed (make setup)")
    importlib.import_module(f"benchmarks.{name}")
