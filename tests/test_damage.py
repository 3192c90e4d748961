"""Damage of every kind to a checkpoint that a training wrote: it is never loaded, and the user is told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import checkpoint, sealing
from ftlib.rundir import RunDir

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from ftlib.train import saving  # noqa: E402
from ftlib.train import trainer as trainers  # noqa: E402
from tests.test_train import adapter_sha, live, trajectory, write_base, write_dataset, write_run  # noqa: E402

STEPS = 6
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training.json",
    checkpoint.MANIFEST,
]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lose(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [cut, flip, lose, empty]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir]:
    """A run that was stopped at step 4 of 6 with checkpoints of 2 and 4, and the same run never stopped."""
    folder = tmp_path_factory.mktemp("damage")
    write_base(folder / "base")
    (folder / "data").mkdir()
    write_dataset(folder / "data")
    train = {"steps": STEPS, "eval_every_steps": None, "save_every_steps": 2}
    runs = [write_run(folder / name / "the-run", folder / "base", folder / "data", train=train) for name in ("a", "b")]
    live(runs[0], 1, stop_after=4)
    live(runs[1], 1)
    return runs[0], runs[1]


@pytest.fixture
def stopped(made: tuple[RunDir, RunDir], tmp_path: Path) -> RunDir:
    shutil.copytree(made[0].path, tmp_path / "the-run")
    return RunDir(tmp_path / "the-run")


def newest(run: RunDir) -> Path:
    return checkpoint.folder_for(run.checkpoints, 4)


def test_the_files_are_these(made: tuple[RunDir, RunDir]) -> None:
    assert sorted(path.name for path in newest(made[0]).iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_seen_and_told(
    stopped: RunDir, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(newest(stopped) / name)
    found = saving.find(stopped)
    assert found.folder == checkpoint.folder_for(stopped.checkpoints, 2) and found.step == 2
    assert "checkpoint step-00000004 is damaged and not used: " in capsys.readouterr().out
    assert name in " ".join(found.rejected["step-00000004"]) or damage is flip


def test_a_flipped_byte_anywhere_in_the_manifest_never_lets_damage_pass(stopped: RunDir) -> None:
    """It may be read as another run, step, format, file or sum, but never as a good checkpoint with other content."""
    manifest = newest(stopped) / checkpoint.MANIFEST
    whole = manifest.read_bytes()
    flip(newest(stopped) / "optimizer.pt")
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        manifest.write_bytes(changed)
        assert checkpoint.problems(newest(stopped), run=stopped.name)


def other_runs(run: RunDir) -> None:
    manifest = json.loads((newest(run) / checkpoint.MANIFEST).read_text())
    (newest(run) / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "run": "another"}))


def older_under_the_newest_name(run: RunDir) -> None:
    shutil.rmtree(newest(run))
    shutil.copytree(checkpoint.folder_for(run.checkpoints, 2), newest(run))


def half_written(run: RunDir) -> None:
    (newest(run) / checkpoint.MANIFEST).unlink()
    (newest(run) / "optimizer.pt").unlink()


def mixed(run: RunDir) -> None:
    shutil.copy(checkpoint.folder_for(run.checkpoints, 2) / "optimizer.pt", newest(run) / "optimizer.pt")


@pytest.mark.parametrize("damage", [other_runs, older_under_the_newest_name, half_written, mixed])
def test_a_training_goes_on_from_the_good_one_and_ends_the_same(
    made: tuple[RunDir, RunDir], stopped: RunDir, damage: Callable[[RunDir], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped)
    live(stopped, 2)
    said = capsys.readouterr().out
    assert "step-00000004 is damaged and not used" in said and "life 2 goes on from step 2 of 6" in said
    assert trajectory(stopped) == trajectory(made[1])
    assert adapter_sha(stopped, STEPS) == adapter_sha(made[1], STEPS)
    assert not checkpoint.problems(newest(stopped), run=stopped.name), "the damaged one was made anew"


def test_with_none_left_it_begins_anew(made: tuple[RunDir, RunDir], stopped: RunDir) -> None:
    for step in (2, 4):
        flip(checkpoint.folder_for(stopped.checkpoints, step) / "adapter_model.safetensors")
    live(stopped, 2)
    assert adapter_sha(stopped, STEPS) == adapter_sha(made[1], STEPS)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_pickle_that_would_run_code_is_refused(
    stopped: RunDir, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even in a checkpoint whose sums are right: whatever is loaded is loaded as data only."""
    monkeypatch.chdir(tmp_path)
    folder = newest(stopped)
    torch.save({"state": Evil()}, folder / name)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).unlink()
    manifest["files"] = sealing.seal(folder)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert saving.find(stopped).step == 4
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        live(stopped, 2)
    assert not (tmp_path / "evil-was-here").exists()


def test_a_failed_save_leaves_the_last_one_and_nothing_else(
    stopped: RunDir, monkeypatch: pytest.MonkeyPatch, made: tuple[RunDir, RunDir]
) -> None:
    """The storage fails while the last file is flushed: not for want of room, so the error stays what it is."""

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(trainers.FineTuner, "_save_rng_state", broken)
        with pytest.raises(OSError, match="Input/output error"):
            live(stopped, 2)
    assert sorted(path.name for path in stopped.checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert saving.find(stopped).step == 4
    live(stopped, 3)
    assert adapter_sha(stopped, STEPS) == adapter_sha(made[1], STEPS)
