"""`make gpu-check`: its dry form on a CPU, rows that survive a kill, and the pack that a bare machine is given."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import carried, pack, results, table
from tests.wishes import CHECKOUT

WAIT_S = 580


def start(out: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """gpu-check in a process group of its own, its results in `out`."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments, "--out", str(out)]
    return subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def rows_in(out: Path) -> list[dict[str, object]]:
    """The rows of the one results file in `out`; none while there is no file."""
    return [row for file in out.glob("*.jsonl") for row in results.read(file)]


class TestDry:
    """The code that a GPU machine runs, with tiny sizes on this one."""

    @pytest.fixture(autouse=True)
    def needs_training_packages(self) -> None:
        pytest.importorskip("torch", reason="the training packages are not installed (make setup)")

    @pytest.mark.slow
    def test_every_check_of_every_group_leaves_a_row(self, odd_dir: Path) -> None:
        process = start(odd_dir, "--dry")
        try:
            output, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
        assert process.returncode == 0, output + errors
        rows = rows_in(odd_dir)
        checks = {group: [row["check"] for row in rows if row["group"] == group] for group in
                  ("basics", "twins", "speed", "large")}  # fmt: skip
        assert [len(names) for names in checks.values()] == [15, 2, 12, 2]
        assert {row["status"] for row in rows} <= {"ok", "measured", "skipped"}
        skipped = {row["check"] for row in rows if row["status"] == "skipped"}
        assert {"varlen attention", "7B + Liger", "packed attention, cudnn"} <= skipped
        assert "7B + varlen" not in skipped  # where documents start is worked out on a CPU, too
        for row in rows:
            assert row["dry"] and row["by"]["torch of the lock"] in (CHECKOUT / "env" / "torch.txt").read_text()
            assert row["by"]["torch"] == metadata.version("torch")
        twins = [row["values"] for row in rows if row["group"] == "twins"]
        assert all(values["resumed equals uninterrupted"] for values in twins)
        # What only a GPU shows stays blank.
        speeds = [row["values"] for row in rows if row["group"] == "large"]
        assert all(values["tokens/s"] and values["GPU peak GiB"] is None for values in speeds)
        [page] = odd_dir.glob("*.md")
        assert page.read_text().startswith("**Dry: ") and "7B + recompute every 4th layer" in page.read_text()

    @pytest.mark.nightly
    def test_every_method_from_prepare_to_evaluate(self, tmp_path: Path) -> None:
        from benchmarks.methods import METHODS

        process = start(tmp_path, "--dry", "--all-methods", "twins")
        try:
            output, errors = process.communicate(timeout=900)
        finally:
            process.kill()
        assert process.returncode == 0, output + errors
        assert [row["status"] for row in rows_in(tmp_path)] == ["ok"] * len(METHODS)

    def test_a_run_that_is_killed_keeps_its_rows(self, tmp_path: Path) -> None:
        process = start(tmp_path, "--dry", "basics", "twins")
        try:
            end = time.monotonic() + WAIT_S
            while len(rows_in(tmp_path)) < 2 and time.monotonic() < end and process.poll() is None:
                time.sleep(0.1)
            process.terminate()
            process.communicate(timeout=60)
        finally:
            process.kill()
        rows = rows_in(tmp_path)
        assert [row["check"] for row in rows[:2]] == ["versions and device", "NF4 bytes, CPU and device"]
        assert all(row["group"] == "basics" for row in rows)
        # The group in progress ended with it.
        time.sleep(1)
        assert len(rows_in(tmp_path)) == len(rows)

    def test_without_a_gpu_nothing_is_measured(self, tmp_path: Path) -> None:
        process = start(tmp_path, environment={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 69 and "no GPU is seen here" in errors
        assert not rows_in(tmp_path)


class TestRecorder:
    """Rows, and a group's time."""

    def recorder(self, folder: Path, budget_s: float = 60) -> results.Recorder:
        return results.Recorder(file=folder / "rows.jsonl", group="a", budget_s=budget_s, device="cpu", dry=False)

    def test_a_failing_check_leaves_the_others(self, tmp_path: Path) -> None:
        recorder = self.recorder(tmp_path)

        def broken() -> dict[str, object]:
            raise RuntimeError("CUDA out of memory")

        def wrong() -> dict[str, object]:
            raise results.Wrong("beyond 0.02", {"dq": 0.5})

        def skipped() -> dict[str, object]:
            raise results.Skip("no such kernel")

        recorder.check("broken", broken, correctness=True)
        recorder.check("wrong", wrong, correctness=True)
        recorder.check("skipped", skipped, correctness=True)
        assert recorder.check("right", lambda: {"dq": 0.001}, correctness=True) == {"dq": 0.001}
        recorder.check("speed", lambda: {"tokens/s": 7}, correctness=False)
        recorder.check("no speed", broken, correctness=False)
        rows = results.read(recorder.file)
        assert [row["status"] for row in rows] == ["failed", "failed", "skipped", "ok", "measured", "error"]
        assert rows[0]["values"] == {} and "out of memory" in rows[0]["reason"]
        assert rows[1]["values"] == {"dq": 0.5}
        assert results.failures(rows) == ["a: broken", "a: wrong"]

    def test_a_process_that_lost_its_gpu_is_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An illegal memory access ends every later call of its process: the checks after it get a new one."""
        code = """if True:
            import os, sys
            from pathlib import Path
            from benchmarks.gpu_check import results
            def lost():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            recorder = results.Recorder(file=Path(sys.argv[1]), group="a", budget_s=60, device="cpu", dry=False)
            recorder.check("before", lambda: {"process": os.getpid()}, correctness=True)
            recorder.check("lost", lost, correctness=True)
            assert recorder.check("before", lambda: {}, correctness=True)["process"] != os.getpid()
            recorder.check("after", lambda: {"process": os.getpid()}, correctness=True)
            """
        wait_for = gpu_check.wait_for
        started = []

        def wait(command: list[str], environment: dict[str, str], timeout_s: float) -> int | None:
            started.append(command)
            return wait_for([sys.executable, "-c", code, str(file)], environment, timeout_s)

        file = tmp_path / "rows.jsonl"
        monkeypatch.setattr(gpu_check, "wait_for", wait)
        gpu_check.run_child("a", file, 60, [], carried.environment(None))
        rows = results.read(file)
        statuses = [(row["check"], row["status"]) for row in rows]
        assert statuses == [("before", "ok"), ("lost", "failed"), ("after", "ok")]
        assert len(started) == 2 and rows[0]["values"] != rows[2]["values"]

    def test_what_the_time_does_not_allow_is_not_begun(self, tmp_path: Path) -> None:
        recorder = self.recorder(tmp_path, budget_s=5)
        recorder.check("long", lambda: pytest.fail("begun"), correctness=True, needs_s=25)
        [row] = results.read(recorder.file)
        assert row["status"] == "not reached" and "25 s needed" in row["reason"]
        assert results.failures([row]) == []

    def test_a_line_that_a_kill_cut_short_is_left_out(self, tmp_path: Path) -> None:
        recorder = self.recorder(tmp_path)
        recorder.check("whole", lambda: {}, correctness=True)
        with recorder.file.open("a") as file:
            file.write('{"group": "a", "che')
        assert [row["check"] for row in results.read(recorder.file)] == ["whole"]

    def test_the_table_says_on_what_it_was_measured(self, tmp_path: Path) -> None:
        recorder = self.recorder(tmp_path)
        recorder.group = "speed"
        recorder.by = {"device": "NVIDIA H200", "torch": "2.11.0", "torch of the lock": "2.13.0"}
        recorder.check("7B today", lambda: {"setting": "7B today", "tokens/s": 7123, "GPU peak GiB": 9.5},
                       correctness=False)  # fmt: skip
        text = table.markdown(results.read(recorder.file))
        assert text.startswith("On NVIDIA H200: torch 2.11.0, torch of the lock 2.13.0.")
        assert "| 7B today | 7,123 | 9.5 |  |  |  | measured |" in text


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel with `files`, as pip downloads it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
    return path


class TestPack:
    """What is carried to a machine without a network."""

    def test_every_package_is_pinned_with_its_hashes(self) -> None:
        lines = pack.requirements().splitlines()
        assert len(lines) == len(pack.PACKAGES)
        assert all("==" in line and "--hash=sha256:" in line and ";" not in line for line in lines)

    def test_it_is_closed(self) -> None:
        """Whatever a package needs is in the pack, but torch and numpy, and what torch itself needs."""
        pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        def needs(name: str) -> set[str]:
            found = set()
            for text in metadata.requires(name) or []:
                requirement = Requirement(text)
                marker = requirement.marker
                if marker is None or marker.evaluate({"python_version": pack.PYTHON, "extra": ""}):
                    found.add(canonicalize_name(requirement.name))
            return found

        provided = {"torch", "numpy", "triton"} | needs("torch")
        carried_names = set(pack.PACKAGES)
        for name in carried_names - {"liger-kernel"}:
            assert needs(name) <= carried_names | provided, name

    def test_of_bitsandbytes_two_libraries_remain(self, tmp_path: Path) -> None:
        names = ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "libbitsandbytes_cuda118.so", "nn.py"]
        path = wheel(tmp_path, "bitsandbytes", "0.50.2", {f"bitsandbytes/{name}": name.encode() * 99 for name in names})
        pack.without_other_libraries(path)
        with zipfile.ZipFile(path) as archive:
            left = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
            assert archive.read("bitsandbytes/nn.py") == b"nn.py" * 99
        assert left == {"METADATA", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "nn.py"}
        again = path.read_bytes()
        pack.without_other_libraries(path)
        assert path.read_bytes() == again

    def test_it_comes_before_what_the_machine_has(self, tmp_path: Path) -> None:
        """Unpacked without pip, seen by an interpreter that has the package in another version."""
        folder, site = tmp_path / "wheels", tmp_path / "site"
        folder.mkdir()
        wheel(folder, "rich", "99.0", {"rich/__init__.py": b"FROM = 'the pack'\n"})
        wheel(folder, "pydantic", metadata.version("pydantic"), {"pydantic/__init__.py": b""})
        assert carried.lacking(folder) == ["rich"]
        assert len(carried.unpack(site, folder)) == 2
        code = "import rich, importlib.metadata as m; print(rich.FROM, m.version('rich'))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=carried.environment(site), capture_output=True, text=True, timeout=60)
        assert done.stdout == "the pack 99.0\n", done.stderr

    @pytest.mark.parametrize(("visible", "one"), [(None, "0"), ("", ""), ("2,5", "2"), ("GPU-a,GPU-b", "GPU-a")])
    def test_one_of_several_gpus_is_used(self, visible: str | None, one: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert carried.environment(None)["CUDA_VISIBLE_DEVICES"] == one

    def test_a_pack_for_another_python_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "there is no pack" in carried.fits(tmp_path)
        wheel(tmp_path, "rich", "99.0", {})
        monkeypatch.setattr(carried, "PYTHON", "3.2")
        assert "the pack is for Python 3.2" in carried.fits(tmp_path)

    def test_a_machine_without_a_network_needs_no_virtual_environment(self, tmp_path: Path) -> None:
        """With a pack and PYTHON=, make goes straight to the check."""
        (tmp_path / "env").mkdir()
        locks = [f"env/{name}.lock" for name in ("login", "train", "deepspeed", "dev")]
        for name in ("Makefile", *locks):
            (tmp_path / name).write_bytes((CHECKOUT / name).read_bytes())
        (tmp_path / "env" / "torch.txt").write_text("torch\n")
        (tmp_path / "env" / "setup.sh").write_text('echo "set-up $*"; exit 69\n')

        def make(*words: str) -> str:
            done = subprocess.run(
                ["make", "gpu-check", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
                env={name: value for name, value in os.environ.items() if name != "PYTHON"})
            return done.stdout

        assert make("PYTHON=echo").startswith("set-up login")
        (tmp_path / ".gpu-wheels").mkdir()
        wheel(tmp_path / ".gpu-wheels", "rich", "99.0", {})
        assert make().startswith("set-up login")
        assert make("PYTHON=echo", "ARGS=basics") == "-m benchmarks.gpu_check basics\n"

    @pytest.mark.nightly
    def test_the_real_pack_is_small_enough(self, tmp_path: Path) -> None:
        """Downloaded as `make gpu-check ARGS=--pack` does. Skipped where there is no network."""
        try:
            size_mb = pack.make(tmp_path / "wheels")
        except SystemExit as error:
            pytest.skip(f"the package registry could not be asked: {error}")
        assert 20 < size_mb < pack.LIMIT_MB
        names = [path.name for path in (tmp_path / "wheels").glob("*.whl")]
        assert len(names) == len(pack.PACKAGES) and not any(name.startswith(("torch-", "nvidia_c")) for name in names)
