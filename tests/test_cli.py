"""The command line: what a user's mistakes are answered with, and that a login node stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.array_shims import Login
from tests.wishes import CHECKOUT, copied_checkout, jobs, run_names

HEAVY = ("torch", "transformers", "datasets", "peft", "bitsandbytes", "numpy", "pandas")


def refused(checkout: Path, *words: str) -> str:
    """stderr of a command that must end with 64, without a traceback, and must have made no run."""
    done = jobs(*words, checkout=checkout)
    assert done.returncode == 64, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert run_names(checkout) == []
    return done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submti"], "Did you mean submit?"),
        ([], "COMMAND"),
        (["submit", "--modle", "tiny"], "Did you mean --model?"),
        (["submit", "--model", "tinny"], "Did you mean tiny?"),
        (["submit", "--cluster", "hipergater"], "Did you mean hipergator?"),
        (["submit", "--set", "optim.lrr=1"], "Did you mean lr?"),
        (["submit", "--set", "optim.lr=fast"], "optim.lr: input should be a valid number"),
        (["submit", "--set", "optim.lr=7"], "less than or equal to 1 (found 7)"),
        (["submit", "--set", "model.name=models/none"], "hf download"),
        (["submit", "--data", "missing.jsonl"], "missing.jsonl"),
        (["submit", "--cluster", "hipergator", "--model", "llama2-7b"], "cluster.account="),
        (["status", "--run", "../x"], "no name of a run"),
        (["logs", "--run", "tiny-1"], "there is no run 'tiny-1'"),
        (["cancel"], "RUN= or SWEEP= is missing"),
        (["resume", "--run", "x"], "there is no run 'x'"),
    ],
)
def test_mistakes_are_answered_in_words(checkout: Path, words: list[str], told: str) -> None:
    assert told in refused(checkout, *words)


def test_mistakes_of_every_kind_are_told_at_once(checkout: Path) -> None:
    told = refused(checkout, "submit", "--model", "tinny", "--cluster", "hipergater", "--set", "word")
    assert all(word in told for word in ("tinny", "hipergater", "'word'"))


def write(folder: Path, text: str) -> str:
    file = folder / "my data.jsonl"
    file.write_text(text, encoding="utf-8")
    return str(file)


def rows(count: int) -> str:
    return "".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) + "\n" for n in range(count))


GOOD = rows(1)


def test_every_bad_line_of_data_is_named(checkout: Path, tmp_path: Path) -> None:
    lines = [GOOD, "{not json\n", '{"instruction": "x"}\n', '{"instruction": "x", "output": ""}\n', "3\n"]
    told = refused(checkout, "submit", "--data", write(tmp_path, "".join(lines)))
    for number in (2, 3, 4, 5):
        assert f"line {number}" in told
    assert "line 1" not in told


def test_many_bad_lines_are_counted(checkout: Path, tmp_path: Path) -> None:
    told = refused(checkout, "submit", "--data", write(tmp_path, GOOD + "{\n" * 57))
    assert "line 21" in told and "line 22" not in told and "37 more" in told


def test_empty_data_is_refused(checkout: Path, tmp_path: Path) -> None:
    assert "empty" in refused(checkout, "submit", "--data", write(tmp_path, ""))


def test_an_edited_data_file_is_another_wish(checkout: Path, tmp_path: Path) -> None:
    def name(text: str) -> str:
        done = jobs("plan", "--json", "--data", write(tmp_path, text), checkout=checkout)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["run"])

    assert name(rows(200)) == name(rows(200)) != name(rows(201))


@pytest.mark.parametrize("cluster", ["hipergator", "a100", "local-slurm"])
def test_dry_run_prints_the_scripts_and_writes_nothing(checkout: Path, cluster: str) -> None:
    done = jobs("submit", "--model", "llama2-7b", "--cluster", cluster, "--dry-run", checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("=====")] == [
        f"===== {stage}.sbatch =====" for stage in ("prepare", "train", "export+evaluate")
    ]
    assert run_names(checkout) == [] and not (checkout / "runs").exists()


def test_schema_is_json_schema_with_a_description_on_every_field(checkout: Path) -> None:
    schema = json.loads(jobs("schema", checkout=checkout).stdout)
    for name, kind in {"RunSpec": schema, **schema["$defs"]}.items():
        for field, said in kind["properties"].items():
            assert "description" in said or "$ref" in said, f"{name}.{field}"


@pytest.mark.parametrize(
    "words",
    [["submit", "--dry-run"], ["plan"], ["status"], ["env", "--before"], ["submit", "--dry-run", "--data", "DATA"]],
)
def test_login_commands_import_nothing_heavy(checkout: Path, tmp_path: Path, words: list[str]) -> None:
    data = write(tmp_path, rows(200))
    code = (
        "import sys; from jobs.cli import main; code = main(sys.argv[1:]); "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(data if word == "DATA" else word for word in words)],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_a_batch_host_needs_the_standard_library_alone() -> None:
    """The host of a container may have nothing else; ftlib/runs asks Slurm nothing."""
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import ftlib.slurm.attempt; "
    code += "import ftlib.runs.act; print('started')"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "started\n", done.stderr
    code = "import sys, ftlib.runs.act, ftlib.runs.folder; print([n for n in sys.modules if n[:11] == 'ftlib.slurm'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_the_ground_imports_no_jobs_and_login_packages_no_torch() -> None:
    """Who may import whom: ftlib never jobs; plan, slurm, report and the ground nothing heavy."""
    modules = [
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
        for folder in ("ftlib", "ftlib/plan", "ftlib/runs", "ftlib/slurm", "ftlib/report")
        for path in (CHECKOUT / folder).glob("*.py")
        if path.stem != "__init__"
    ]
    code = f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"print([n for n in ('jobs', *{HEAVY}) if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_no_space_left_is_told_before_anything_is_made(checkout: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system of one MiB can be mounted by root alone")
    runs = checkout / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(runs)], capture_output=True, timeout=120
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        told = refused(checkout, "submit", "--cluster", "local")
        assert "no space left for run tiny-" in told and "MiB free" in told
        assert list(runs.iterdir()) == []
    finally:
        subprocess.run(["umount", str(runs)], check=True, timeout=120)
        runs.rmdir()


def test_a_cancelled_run_that_is_still_saving_is_not_resumed_half(tmp_path: Path) -> None:
    login = Login(copied_checkout(tmp_path), tmp_path)
    assert login.jobs("submit", "--cluster", "local-slurm").returncode == 0
    (run,) = run_names(login.checkout)
    assert login.jobs("cancel", "--run", run).returncode == 0
    queue = login.queue
    (train,) = queue.of("train")
    queue.arrays[train]["tasks"][""] = "COMPLETING"
    queue.save()
    refused = login.jobs("resume", "--run", run)
    assert refused.returncode == 1 and "train was cancelled and is still saving" in refused.stderr
    assert len(login.queue.arrays) == len(queue.arrays)
    queue.arrays[train]["tasks"][""] = "CANCELLED"
    queue.save()
    assert login.jobs("resume", "--run", run).returncode == 0
    assert len(login.queue.arrays) > len(queue.arrays)
