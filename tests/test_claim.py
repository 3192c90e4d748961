"""A folder has one writer, whoever dies at whatever moment, and however many take over at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ftlib import claim
from ftlib.claim import Taken
from ftlib.errors import InputError
from tests.processes import started
from tests.wishes import CHECKOUT

# Rounds in which so many processes take over one stale claim at the same moment. Each winner makes a folder that must
# not be there, and removes it before it lets go.
CROWD = """
import contextlib, multiprocessing, os, socket, sys, time
from pathlib import Path
from ftlib.claim import claim
from ftlib.errors import InputError

def contend(folder, rounds, started, ended, won, broken):
    for number in range(rounds):
        started.wait(60)
        for attempt in range(2):
            with contextlib.suppress(InputError), claim(folder, "the folder"):
                try:
                    os.mkdir(folder / "held")
                except FileExistsError:
                    broken.value += 1
                else:
                    won[number] = 1
                    time.sleep(0.001)
                    os.rmdir(folder / "held")
        ended.wait(60)

if __name__ == "__main__":
    folder, processes, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    fork = multiprocessing.get_context("fork")
    started, ended = fork.Barrier(processes + 1), fork.Barrier(processes + 1)
    won, broken = fork.Array("b", rounds), fork.Value("i", 0)
    arguments = (folder, rounds, started, ended, won, broken)
    crowd = [fork.Process(target=contend, args=arguments, daemon=True) for _ in range(processes)]
    for one in crowd:
        one.start()
    for number in range(rounds):
        (folder / "writer").write_text(f"{socket.gethostname()} {gone} {number}")
        started.wait(60)
        ended.wait(60)
    left = [path.name for path in folder.iterdir()]
    print(broken.value, sum(won), left)
"""


def test_many_processes_that_take_over_a_stale_claim_are_never_two(tmp_path: Path) -> None:
    rounds = 400
    memory = Path("/dev/shm")  # thousands of flushes take a minute on a disk
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, "-c", CROWD, folder, "10", str(rounds)], cwd=CHECKOUT, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"0 {rounds} []"


def test_one_writer_at_a_time(odd_dir: Path) -> None:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    with claim.claim(odd_dir, "it"), pytest.raises(Taken, match=who), claim.claim(odd_dir, "it"):
        pass
    with claim.claim(odd_dir, "it"):
        owner = claim.read(odd_dir)
        assert owner is not None and owner.works_here() and owner.pid == os.getpid()
    assert claim.read(odd_dir) is None and list(odd_dir.iterdir()) == []


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, timeout=120
    )
    return int(done.stdout)


def test_a_dead_writers_claim_is_taken_over_but_not_another_machines(tmp_path: Path, gone: int) -> None:
    (tmp_path / "writer").write_text(f"{socket.gethostname()} {gone}")
    with claim.claim(tmp_path, "it"):
        pass
    (tmp_path / "writer").write_text("elsewhere 1")
    with pytest.raises(Taken, match="delete"), claim.claim(tmp_path, "it"):
        pass


def test_a_number_that_this_process_has_from_a_dead_one_is_no_claim(tmp_path: Path) -> None:
    """In a container each start may have the number of the last."""
    (tmp_path / "writer").write_text(f"{socket.gethostname()} {os.getpid()} nonce-of-the-dead")
    with claim.claim(tmp_path, "it"):
        pass


def test_who_died_while_it_took_over_is_taken_over_too(tmp_path: Path, gone: int) -> None:
    (tmp_path / "writer").write_text(f"{socket.gethostname()} {gone} first")
    standing = claim.read(tmp_path)
    assert standing is not None
    (tmp_path / f"writer.{standing.digest()}").write_text(f"{socket.gethostname()} {gone} second")
    with claim.claim(tmp_path, "it"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_takes_over_at_this_moment_is_not_disturbed(tmp_path: Path, gone: int) -> None:
    (tmp_path / "writer").write_text(f"{socket.gethostname()} {gone} first")
    standing = claim.read(tmp_path)
    assert standing is not None
    (tmp_path / f"writer.{standing.digest()}").write_text(f"{socket.gethostname()} {os.getppid()} second")
    with pytest.raises(Taken, match="just begun"), claim.claim(tmp_path, "it"):
        pass


def test_an_empty_claim_blocks_for_seconds_only(tmp_path: Path) -> None:
    """An earlier version that was killed, or found the disk full, between making its file and writing it."""
    (tmp_path / "writer").touch()
    with pytest.raises(Taken, match="an unknown machine"), claim.claim(tmp_path, "it"):
        pass
    os.utime(tmp_path / "writer", (time.time() - claim.EMPTY_S - 1,) * 2)
    with claim.claim(tmp_path, "it"):
        pass


def test_a_silent_claim_of_another_machine_is_taken_over_by_who_says_so(tmp_path: Path) -> None:
    (tmp_path / "writer").write_text("login2 4711")
    with pytest.raises(Taken), claim.claim(tmp_path, "it", silent_s=claim.SILENT_S):
        pass
    os.utime(tmp_path / "writer", (time.time() - 3600,) * 2)
    with pytest.raises(Taken), claim.claim(tmp_path, "it"):
        pass
    with claim.claim(tmp_path, "it", silent_s=claim.SILENT_S):
        pass
    assert claim.read(tmp_path) is None


def test_a_claim_that_is_held_is_kept_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "TOUCH_EVERY_S", 0.05)
    monkeypatch.setattr(claim, "_touched", claim._Touched())
    with claim.claim(tmp_path, "it"):
        os.utime(tmp_path / "writer", (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / "writer").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_claim_waits_for_the_one_before(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from ftlib.claim import claim\n"
    code += "with claim(Path(sys.argv[1]), 'it'):\n    print('held', flush=True); time.sleep(1.5)"
    with started([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with claim.claim(tmp_path, "it", wait_s=60):
            assert other.wait(timeout=30) == 0


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"), claim.claim(tmp_path / "gone", "it"):
        pass
    (tmp_path / "writer").mkdir()
    with pytest.raises(InputError, match="cannot be read"), claim.claim(tmp_path, "it"):
        pass
