"""Export: files that plain peft and plain transformers load, and that compute what the trained model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import FtError, Interrupted
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag

torch = pytest.importorskip("torch", reason="export needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="export needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="export needs bitsandbytes: the train extra")

from peft import AutoPeftModelForCausalLM  # noqa: E402

from ftlib.data.dataset import PackedRows  # noqa: E402
from ftlib.export import run as exporting  # noqa: E402
from ftlib.export.run import compare, logits_of  # noqa: E402
from ftlib.export.weights import merge  # noqa: E402
from ftlib.train.methods import load_trained  # noqa: E402
from ftlib.train.model import load_base  # noqa: E402
from tests.test_train import ROWS, live, torch_as_it_was, write_base, write_dataset, write_run  # noqa: E402

__all__ = ["torch_as_it_was"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose training is complete."""
    root = tmp_path_factory.mktemp("trained")
    for name, write in (("base", write_base), ("dataset", write_dataset)):
        (root / name).mkdir()
        write(root / name)
    run = write_run(root / "the-run", root / "base", root / "dataset", export={"dtype": "float32"})
    live(run, 1)
    return run


@pytest.fixture
def run(trained: RunDir) -> Iterator[RunDir]:
    """That run with nothing exported yet."""
    yield trained
    shutil.rmtree(trained.export, ignore_errors=True)


def change(run: RunDir, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Other values in the run's spec.export."""
    spec = run.spec()
    changed = spec.model_copy(update={"export": spec.export.model_copy(update=values)})
    monkeypatch.setattr(RunDir, "spec", lambda self: changed)


def equality(run: RunDir) -> dict[str, Any]:
    found = json.loads((run.export / "equality.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_exported_computes_what_was_trained(
    run: RunDir, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, monkeypatch, dtype=dtype)
    words = exporting.export(run, 1, StopFlag())
    assert words.startswith("exported the adapter (") and f"merged {dtype} weights" in words
    found = equality(run)
    assert found["passed"] and found["rows"] == 36 and found["mean_abs"] <= found["allowed"] == 0.05 * found["spread"]
    assert found["adapter"] == {"max_abs": 0.0, "mean_abs": 0.0}
    assert 0 < found["mean_abs"] < 0.03 * found["spread"] and found["top1_agreement"] > 0.95

    merged = transformers.AutoModelForCausalLM.from_pretrained(run.export / "merged")
    assert merged.dtype is getattr(torch, dtype)
    config = json.loads((run.export / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == dtype
    assert transformers.AutoTokenizer.from_pretrained(run.export / "merged")("t5 t6")["input_ids"] == [5, 6]
    names = {name for name, _ in merged.named_parameters()}
    assert names == {
        name
        for name, _ in transformers.AutoModelForCausalLM.from_pretrained(
            run.provenance()["model_path"]
        ).named_parameters()
    }
    assert sorted(path.name for path in run.export.iterdir()) == ["adapter", "equality.json", "merged"]
    assert "quantised to nf4" in capsys.readouterr().out


def test_plain_peft_loads_the_adapter(run: RunDir) -> None:
    exporting.export(run, 1, StopFlag())
    plain = AutoPeftModelForCausalLM.from_pretrained(str(run.export / "adapter"), dtype=torch.float32)
    model_path = run.provenance()["model_path"]
    assert plain.peft_config["default"].base_model_name_or_path == model_path
    rows = PackedRows(Path(run.prepared()["dataset"]) / "validation")
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    merged = logits_of(transformers.AutoModelForCausalLM.from_pretrained(run.export / "merged"), CPU)
    # On the original base the adapter is nearly the trained model, and far from no adapter at all.
    near = compare(merged, logits_of(plain, CPU), rows, 8, 4, StopFlag())
    far = compare(merged, logits_of(original, CPU), rows, 8, 4, StopFlag())
    assert near["mean_abs"] < 0.7 * far["mean_abs"]


def test_another_model_fails_the_stage_and_is_not_left_there(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting.write_merged

    def wrong(*args: Any) -> None:
        write(*args)
        model = transformers.AutoModelForCausalLM.from_pretrained(run.provenance()["model_path"])
        model.save_pretrained(args[-1])

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_merged", wrong)
        with pytest.raises(FtError, match=r"not equal to the trained one: logits differ by .* is allowed"):
            exporting.export(run, 1, StopFlag())
    assert not equality(run)["passed"] and not (run.export / "merged").exists()
    exporting.export(run, 2, StopFlag())
    assert equality(run)["passed"] and (run.export / "merged").is_dir()


def test_a_second_life_does_nothing_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    words = exporting.export(run, 1, StopFlag())
    monkeypatch.setattr(exporting, "write_merged", lambda *_: pytest.fail("merged again"))
    monkeypatch.setattr(exporting, "load_trained", lambda *_: pytest.fail("loaded again"))
    assert exporting.export(run, 2, StopFlag()) == words


def test_a_stop_between_the_parts_keeps_what_is_whole(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, write = StopFlag(), exporting.write_merged

    def stopped(*args: Any) -> None:
        write(*args)
        stop.cause = "preemption"

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_merged", stopped)
        with pytest.raises(Interrupted):
            exporting.export(run, 1, stop)
    assert [path.name for path in run.export.iterdir()] == ["adapter"]
    exporting.export(run, 2, StopFlag())
    assert equality(run)["passed"]


def test_the_adapter_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    change(run, monkeypatch, merged=False)
    assert "merged" not in exporting.export(run, 1, StopFlag())
    assert equality(run)["compared"] == "adapter" and not (run.export / "merged").exists()


def test_nothing_is_exported_before_training_is_complete(tmp_path: Path, trained: RunDir) -> None:
    dataset, base = Path(trained.prepared()["dataset"]), Path(trained.provenance()["model_path"])
    run = write_run(tmp_path / "the-run", base, dataset)
    with pytest.raises(FtError, match="nothing to export yet: training is not complete"):
        exporting.export(run, 1, StopFlag())
    live(run, 1, stop_after=9)
    with pytest.raises(FtError, match="step 9 of 30"):
        exporting.export(run, 1, StopFlag())
    assert ROWS and not run.export.exists()


def test_merging_into_4_bit_is_refused(trained: RunDir) -> None:
    base = load_base(trained.spec(), trained.provenance()["model_path"], CPU)
    with pytest.raises(FtError, match="not merged into a 4-bit model"):
        merge(base, trained.checkpoints / "step-00000030")


def test_packed_documents_do_not_see_each_other(trained: RunDir) -> None:
    """The comparison reads rows as training does: another first document changes no logit of the second."""
    model = load_trained(trained.spec(), trained.provenance()["model_path"], CPU, trained.checkpoints / "step-00000030")
    row = PackedRows(Path(trained.prepared()["dataset"]) / "validation")[0]
    second = int((row["position_ids"] == 0).nonzero()[1])
    other = {name: tensor.clone()[None] for name, tensor in row.items()}
    other["input_ids"][0, 1 : second - 1] = 7
    logits = logits_of(model, CPU)
    with torch.no_grad():
        one, two = logits({name: tensor[None] for name, tensor in row.items()}), logits(other)
    assert torch.equal(one[0, second:], two[0, second:]) and not torch.equal(one[0, :second], two[0, :second])
