"""A checkpoint that is not whole, or not this run's, is never taken."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import atomic, checkpoint, sealing
from ftlib.errors import InputError


def save(folder: Path, step: int, run: str = "r") -> Path:
    folder.mkdir(exist_ok=True)
    temporary = atomic.temporary_beside(folder / "save")
    (temporary / "sub").mkdir(parents=True)
    (temporary / "weights.bin").write_bytes(bytes([step]) * 1000)
    (temporary / "sub" / "state.json").write_text(json.dumps({"step": step}))
    return checkpoint.commit(temporary, folder, run=run, step=step)


def cut(folder: Path) -> None:
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:-1])


def flip(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[500] ^= 1
    (folder / "weights.bin").write_bytes(content)


def lose(folder: Path) -> None:
    (folder / "sub" / "state.json").unlink()


def add(folder: Path) -> None:
    (folder / "stray.pt").write_text("x")


def no_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def half_manifest(folder: Path) -> None:
    cut_text = (folder / checkpoint.MANIFEST).read_text()[:40]
    (folder / checkpoint.MANIFEST).write_text(cut_text)


def other_runs(folder: Path) -> None:
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "run": "other"}))


DAMAGES = [cut, flip, lose, add, no_manifest, half_manifest, other_runs]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_older_one_is_taken(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.newest(tmp_path, run="r") == (newest, {})
    damage(newest)
    found, rejected = checkpoint.newest(tmp_path, run="r")
    assert found == older
    assert list(rejected) == [newest.name] and rejected[newest.name]


def test_a_save_that_was_never_finished_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / f"{atomic.TEMPORARY}save-1").mkdir()
    assert checkpoint.newest(tmp_path, run="r") == (None, {})


def test_a_damaged_step_is_saved_again_and_a_good_one_kept(tmp_path: Path) -> None:
    first = save(tmp_path, 3)
    cut(first)
    assert checkpoint.problems(save(tmp_path, 3), run="r") == []
    before = (first / "weights.bin").stat().st_ino
    assert (save(tmp_path, 3) / "weights.bin").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_renamed_to_another_step_is_refused(tmp_path: Path) -> None:
    shutil.move(save(tmp_path, 1), tmp_path / "step-00000009")
    assert checkpoint.newest(tmp_path, run="r")[0] is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, run="r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_damaged_one_does_not_count_among_the_kept(tmp_path: Path) -> None:
    for step in range(1, 4):
        save(tmp_path, step)
    cut(checkpoint.folder_for(tmp_path, 2))
    checkpoint.prune(tmp_path, run="r")
    assert checkpoint.folder_for(tmp_path, 1).exists() and checkpoint.folder_for(tmp_path, 3).exists()


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no space left for it.*MiB free"):
        atomic.require_space(tmp_path / "not" / "there", 2**60, "it")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.write_text(tmp_path / "f", "old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftlib.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(tmp_path / "f", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 12288, 12289])
def test_a_streamed_file_is_hashed_as_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Block by block while it grows, in pieces of any size: the same sum as of the file that lies there."""
    monkeypatch.setattr(sealing, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(sealing, "FLUSH_BYTES", 8192)
    content = bytes(random.Random(size).randbytes(size))
    with sealing.Sealer(tmp_path) as sealer:
        with sealer.stream("streamed") as stream:
            for start in range(0, size, 700):
                stream.write(content[start : start + 700])
        (tmp_path / "whole").write_bytes(content)
        sealed = sealer.finish()
    assert (tmp_path / "streamed").read_bytes() == content
    assert sealed["streamed"] == sealed["whole"] and sealed["whole"]["bytes"] == size
    assert sealing.digest(tmp_path / "whole", sealer.algorithm) == sealed["whole"]["digest"]
    assert sealing.damage(tmp_path, sealed, "manifest") == []


def test_a_flush_that_fails_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr("ftlib.sealing.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        sealing.seal(tmp_path)


def test_the_best_and_every_nth_stay(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, run="r", best=3, every=4)
    assert [checkpoint.step_of(folder) for folder in checkpoint.committed(tmp_path)] == [10, 9, 8, 4, 3]
