"""The quantised base that is kept for the next life: the same to the bit, or not used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ftlib.rundir import RunDir

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from ftlib.train import quantised  # noqa: E402
from ftlib.train.model import load_base  # noqa: E402
from tests.test_train import adapter_sha, live, trajectory, write_base, write_dataset, write_run  # noqa: E402

CPU = torch.device("cpu")
TRAIN = {"steps": 6, "eval_every_steps": 3, "save_every_steps": 3}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    write_base(tmp_path / "base")
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data")
    return write_run(tmp_path / "a" / "the-run", tmp_path / "base", tmp_path / "data", train=TRAIN)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep even a tiny model's weights."""
    monkeypatch.setattr(quantised, "PAYS_FROM_BYTES", 0)


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights, and what is needed to read the 4-bit ones."""
    found = dict(model.state_dict())
    assert any("absmax" in name for name in found) and any("nested" in name for name in found)
    return found


def load(run: RunDir, tmp_path: Path) -> torch.nn.Module:
    return load_base(run.spec(), run.provenance()["model_path"], CPU, tmp_path / "cache")


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "quantised").glob("*"))


def test_the_next_life_loads_the_same_bits(
    run: RunDir, tmp_path: Path, always: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(run, tmp_path)
    assert "4-bit weights kept for the next life" in capsys.readouterr().out
    again = load(run, tmp_path)
    assert "kept from an earlier life" in capsys.readouterr().out
    before, after = everything(first), everything(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert [p.dtype for p in first.parameters()] == [p.dtype for p in again.parameters()]
    assert again.config.name_or_path == first.config.name_or_path == str(tmp_path / "base")
    ids = torch.arange(20).reshape(1, -1)
    assert torch.equal(first(ids).logits, again(ids).logits)


def test_a_run_ends_the_same_with_kept_weights(run: RunDir, tmp_path: Path, always: None) -> None:
    other = write_run(tmp_path / "b" / "the-run", tmp_path / "base", tmp_path / "data", train=TRAIN)
    live(run, 1, stop_after=4)
    live(run, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "PAYS_FROM_BYTES", 1 << 40)
        live(other, 1)
    assert trajectory(run) == trajectory(other) and adapter_sha(run, 6) == adapter_sha(other, 6)
    configs = [next(r.checkpoints.glob("step-*6")) / "adapter_config.json" for r in (run, other)]
    assert configs[0].read_text() == configs[1].read_text(), "the adapter names the model, not the cache"


def test_damaged_ones_are_told_and_made_anew(
    run: RunDir, tmp_path: Path, always: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(load(run, tmp_path))
    weights = next(kept(tmp_path)[0].glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    after = everything(load(run, tmp_path))
    said = capsys.readouterr().out
    assert "are damaged and made anew: model.safetensors does not match its checksum" in said
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert quantised.sound(kept(tmp_path)[0], remove=False)


def test_other_weights_or_another_quantisation_are_another_place(run: RunDir, tmp_path: Path, always: None) -> None:
    def place(**method: object) -> Path | None:
        spec = run.spec().method.model_copy(update=method)
        return quantised.place(tmp_path, str(tmp_path / "base"), None, spec, torch.float32, CPU)

    places = [place(), place(quant_type="fp4"), place(double_quant=False)]
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    places.append(place())
    assert len({str(path) for path in places}) == 4 and place() == place(rank=8)


def test_small_models_are_not_kept(run: RunDir, tmp_path: Path) -> None:
    load(run, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_no_room_for_them_stops_nothing(
    run: RunDir, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    load(run, tmp_path)
    assert "the 4-bit weights could not be kept" in capsys.readouterr().out and kept(tmp_path) == []
