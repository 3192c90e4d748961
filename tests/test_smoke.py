"""`make env`, `make smoke`, and the page for the first hour: its commands, read out of it, run on a real Slurm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftlib.rundir import RunDir
from ftlib.runs import outcome
from jobs import smoke
from tests.cluster import Slurm
from tests.processes import started
from tests.wishes import CHECKOUT, copied_checkout, jobs, run_names, site

pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
pytestmark = pytest.mark.slow

PAGE = (CHECKOUT / "docs" / "first-hour.md").read_text()
SMALL = "train.steps=20 data.pairs=600 evaluate.pairs=8 evaluate.max_new_tokens=8"


def commands(page: str) -> list[str]:
    """The page's indented lines, without the remarks behind them."""
    lines = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines]


def made_venv(folder: Path, checkout: Path) -> Path:
    """This interpreter's packages as a virtual environment that `make` finds whole: nothing is installed."""
    folder.mkdir()
    for name in ("bin", "lib"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", folder)
    locks = {"login": ["login.lock"], "train": ["train.lock", "deepspeed.lock", "torch.txt"]}
    for stage, files in locks.items():
        text = b"".join((checkout / "env" / name).read_bytes() for name in files)
        summed = subprocess.run(["cksum"], input=text, capture_output=True, check=True, timeout=60)
        number = summed.stdout.split()[0].decode()
        (folder / f".{stage}-{number}").touch()
    return folder


def test_a_smoke_run_without_slurm_ends_with_what_it_measured(tmp_path: Path) -> None:
    checkout = copied_checkout(tmp_path)
    done = jobs("smoke", "--cluster", "local", "--set", "train.eval_every_steps=200", checkout=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("packages", "GPU", "imports", "storage", "caches", "data", "10 steps"):
        assert re.search(rf"ok +{name} ", done.stdout), name
    (folder,) = (checkout / "runs" / "smoke").iterdir()
    found = json.loads((folder / "smoke.json").read_text())
    assert found["tokens_per_s"] > 0 and 0.1 < found["peak_gib"] < 8 and found["planned_gib"] == 6
    # The whole run is the recipe's 1,000 steps.
    assert found["whole_min"] == pytest.approx(1000 * found["step_s"] / 60, abs=0.06)
    assert "The whole training of 1,000 steps would take" in done.stdout and "validation loss" in done.stdout
    assert not (folder / "checkpoints").exists()
    assert run_names(checkout) == []  # no run like those that status lists

    bad = jobs(
        "env", "--cluster", "local", "--set", "cluster.environment.TRITON_CACHE_DIR=/proc/none", checkout=checkout
    )
    assert bad.returncode == 64 and re.search(
        "FAILED +caches +TRITON_CACHE_DIR: .*\n.* mend: name a folder", bad.stdout
    )
    assert "checks on" in bad.stderr and "Traceback" not in bad.stderr + bad.stdout


def test_ctrl_c_ends_a_smoke_run_in_words(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "jobs", "smoke", "--cluster", "local"]
    log = tmp_path / "said"
    with log.open("w") as out, started(words, stdout=out, stderr=out, cwd=copied_checkout(tmp_path)) as one:
        soon(log, "packages")
        one.send_signal(2)
        assert one.wait(60) == 75
    said = log.read_text()
    assert "Start it anew" in said and "Traceback" not in said


def test_every_fault_of_a_wish_is_told_before_anything_is_made(tmp_path: Path) -> None:
    checkout = copied_checkout(tmp_path)
    wrong = jobs("smoke", "--cluster", "local", "--model", "tinny", "--set", "optim.lrr=1", checkout=checkout)
    assert wrong.returncode == 64 and "Did you mean tiny?" in wrong.stderr
    wrong = jobs("smoke", "--cluster", "local", "--set", "optim.lrr=1 method.rank=0", checkout=checkout)
    assert wrong.returncode == 64 and "optim.lr" in wrong.stderr and "method.rank" in wrong.stderr
    assert not (checkout / "runs").exists()


def test_what_another_rank_says_is_shown_where_the_job_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    (run.slurm / "smoke").mkdir(parents=True)
    (run.slurm / "smoke" / "7_0_log.out").write_text("ok      packages\n")
    (run.slurm / "smoke" / "7_1_log.out").write_text("FAILED  driver     too old\n        on n2, rank 1\n")
    outcome.write(run.outcomes, outcome.Outcome("smoke", 1, 75, "interrupted (preemption)"))
    assert smoke._follow(run, {"smoke": "7"}, site("local-slurm")) == 75
    said = capsys.readouterr().out
    assert "7_1_log.out" in said and "on n2, rank 1" in said


class TestOnSlurm:
    """The page's commands, and a job that is ended from outside."""

    @pytest.fixture
    def ready(self, slurm: Slurm, tmp_path: Path) -> tuple[Path, dict[str, str]]:
        """A checkout on "group storage", the remote that the page clones, and the shell's environment."""
        origin, storage = tmp_path / "origin", tmp_path / "blue" / "lab" / "ada"
        storage.mkdir(parents=True)

        def left_out(folder: str, names: list[str]) -> set[str]:
            of_this_machine = {"runs", "cluster.yaml"} & {*names} if Path(folder) == CHECKOUT else set()
            return of_this_machine | shutil.ignore_patterns(".*", "__pycache__")(folder, names)

        shutil.copytree(CHECKOUT, origin, ignore=left_out)
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
            subprocess.run([*git, *words], check=True, timeout=60)
        venv = made_venv(tmp_path / "venv", CHECKOUT)
        return tmp_path, {**slurm.env, "VENV": str(venv)}

    def test_every_command_of_the_first_hour_works(self, ready: tuple[Path, dict[str, str]], slurm: Slurm) -> None:
        folder, environment = ready
        told = commands(PAGE)
        for word in ("git clone", "cluster.yaml", "make env", "make smoke", "make submit", "report.md"):
            assert any(word in line for line in told), word
        blue, conf = folder / "blue" / "lab" / "ada", slurm.env["SLURM_CONF"]
        steps = {
            "/blue/my-group/$USER": str(blue),
            "<this repository>": str(folder / "origin"),
            "name: hipergator": "name: local-slurm",
            "'account: my-group'": f"'account: lab\nscheduler.slurm_conf: {conf}'",
            "codellama-13b-0123abcd": "$(basename runs/tiny-*)",
            "smoke MODEL=codellama-13b": f'smoke MODEL=tiny SET="{SMALL} resources.nodes=2"',
            "MODEL=codellama-13b": f'MODEL=tiny SET="{SMALL}"',
        }
        script = "set -e\n"
        for line in told:
            for said, here in steps.items():
                line = line.replace(said, here)
            if "make why" in line:  # a person comes back when it is done
                script += "until [ -e runs/tiny-*/report.md ]; do sleep 1; done\n"
            script += f"{line}\n"
        assert "hipergator" not in script and "my-group" not in script and "codellama" not in script
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=400)
        said = done.stdout
        assert done.returncode == 0, said[-6000:] + done.stderr[-3000:]
        (checkout,) = blue.iterdir()
        assert "the environment of local-slurm works on n" in said and "adapter" in said.splitlines()
        assert re.search(r"ok +collectives +2 ranks met in", said)
        assert "The whole training of 20 steps would take" in said
        assert (len(run_names(checkout)) == 1 and "| tuned |" in said.replace("**", "")) or "tuned" in said
        # Given again: the environment is whole and checked.
        again = ["make", "-C", str(checkout), "env"]
        done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Checked before; NEW=1 checks again." in done.stdout

    def test_a_job_that_is_ended_from_outside_is_told_and_found_again(
        self, ready: tuple[Path, dict[str, str]], slurm: Slurm, request: pytest.FixtureRequest
    ) -> None:
        folder, environment = ready
        blocker = slurm.sbatch("-pgpu", "-N3", "--exclusive", "-t3", "-o/dev/null", "--wrap=sleep 150")
        request.addfinalizer(lambda: slurm.run(["scancel", blocker]))
        words = [sys.executable, "-m", "jobs", "smoke", "--cluster", "local-slurm", "--set"]
        words.append(f"cluster.scheduler.slurm_conf={slurm.env['SLURM_CONF']}")
        options: dict[str, Any] = {"cwd": folder / "origin", "env": environment}
        log = folder / "said"
        with log.open("w") as out, started(words, stdout=out, stderr=out, **options) as first:
            soon(log, "PENDING")
            first.send_signal(2)
            assert first.wait(30) != 0
        said = log.read_text()
        jobs = re.findall(r"Queued: \w+ as job (\d+)", said)
        assert len(jobs) == 2 and f"scancel {jobs[0]} {jobs[1]} ends it" in said and "Traceback" not in said
        with log.open("w") as out, started(words, stdout=out, stderr=out, **options) as second:
            soon(log, "PENDING")
            slurm.run(["scancel", *jobs])
            assert second.wait(60) == 1
        said = log.read_text()
        assert f"Job {jobs[0]} and job {jobs[1]}: on the way already." in said and "Slurm says CANCELLED" in said


def soon(log: Path, word: str) -> None:
    deadline = time.monotonic() + 60
    while word not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
