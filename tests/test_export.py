"""Export: files that plain peft and plain transformers load, and that compute what the trained model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import FtError, Interrupted
from ftlib.report import page
from ftlib.rundir import RunDir
from ftlib.runs import events
from ftlib.runs.events import Progress
from ftlib.stop import StopFlag

torch = pytest.importorskip("torch", reason="export needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="export needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="export needs bitsandbytes: the train extra")

from peft import AutoPeftModelForCausalLM  # noqa: E402

from ftlib.data.dataset import PackedRows  # noqa: E402
from ftlib.export import run as exporting  # noqa: E402
from ftlib.export import shards  # noqa: E402
from ftlib.export.equality import compare, logits_of  # noqa: E402
from ftlib.train.methods import load_trained  # noqa: E402
from tests.test_train import ROWS, live, torch_as_it_was, write_base, write_dataset, write_run  # noqa: E402
from tests.wishes import set_numerics  # noqa: E402

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

    def wrong(*args: Any, **options: Any) -> None:
        write(*args, **options)
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
    monkeypatch.setattr(exporting, "write_merged", lambda *_, **__: pytest.fail("merged again"))
    monkeypatch.setattr(exporting, "load_trained", lambda *_: pytest.fail("loaded again"))
    assert exporting.export(run, 2, StopFlag()) == words


def test_a_stop_between_the_parts_keeps_what_is_whole(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, write = StopFlag(), exporting.write_merged

    def stopped(*args: Any, **options: Any) -> None:
        write(*args, **options)
        stop.cause = "preemption"

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_merged", stopped)
        with pytest.raises(Interrupted):
            exporting.export(run, 1, stop)
    assert sorted(path.name for path in run.export.iterdir()) == [".unfinished", "adapter"]
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


def pieces(run: RunDir) -> list[str]:
    """What the export stage has reported as committed since the file of events was last removed."""
    return [event.piece for event in run.ledger().of(Progress)]


def stop_after(monkeypatch: pytest.MonkeyPatch, stop: StopFlag, piece: str) -> None:
    """A stop is asked for as soon as a piece whose name begins so is committed."""
    progressed = events.progressed

    def watched(run: Path, stage: str, life: int, name: str) -> None:
        progressed(run, stage, life, name)
        if name.startswith(piece):
            stop.cause = "preemption"

    monkeypatch.setattr(events, "progressed", watched)


@pytest.fixture
def small_shards(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """That run, whose merged weights take several shards, with no events yet."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    shutil.rmtree(run.events, ignore_errors=True)
    return run


def test_ten_interruptions_cost_no_finished_shard_and_no_compared_row(
    small_shards: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt commits one piece at least and reports it; none is made twice; the files are as without a stop."""
    run, life = small_shards, 0
    exporting.export(run, 1, StopFlag())
    whole = {path.name: path.read_bytes() for path in (run.export / "merged").iterdir()}
    expected = equality(run)
    at_once = pieces(run)
    assert "model.safetensors.index.json" in whole
    assert sum(name.startswith("model-0000") for name in at_once) == sum(name.endswith("tensors") for name in whole) > 2
    assert at_once[0] == "adapter" and at_once[-1] == "equality.json" and len(set(at_once)) == len(at_once) > 40
    shutil.rmtree(run.export)
    shutil.rmtree(run.events)

    stops = ["adapter", "model-00001", "model-00002", "logits of rows 0 ", "logits of rows 10 ", "rows 0 ", "rows 10 "]
    for life, piece in enumerate(stops, start=1):
        with monkeypatch.context() as patch:
            stop = StopFlag()
            stop_after(patch, stop, piece)
            with pytest.raises(Interrupted):
                exporting.export(run, life, stop)
        assert not (run.export / "merged").exists() and pieces(run)[-1].startswith(piece)
    exporting.export(run, life + 1, StopFlag())
    assert pieces(run) == at_once
    assert whole == {path.name: path.read_bytes() for path in (run.export / "merged").iterdir()}
    assert equality(run) | {"seconds": 0} == expected | {"seconds": 0}
    assert sorted(path.name for path in run.export.iterdir()) == ["adapter", "equality.json", "merged"]


def test_a_stop_is_obeyed_between_two_tensors(small_shards: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftlib.export.merge import MergedTensors

    run, stop, take, taken = small_shards, StopFlag(), MergedTensors.take, []

    def watched(self: MergedTensors, name: str) -> Any:
        taken.append(name)
        stop.cause = "preemption"
        return take(self, name)

    monkeypatch.setattr(MergedTensors, "take", watched)
    with pytest.raises(Interrupted):
        exporting.export(run, 1, stop)
    assert len(taken) == 1


def test_a_damaged_shard_is_written_again_and_only_that(
    small_shards: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_shards
    with monkeypatch.context() as patch:
        stop = StopFlag()
        stop_after(patch, stop, "model-00003")
        with pytest.raises(Interrupted):
            exporting.export(run, 1, stop)
    damaged = sorted((run.export / ".unfinished" / "merged").glob("*.safetensors"))[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    shutil.rmtree(run.events)
    exporting.export(run, 2, StopFlag())
    said = capsys.readouterr().out
    assert f"{damaged.name} of an earlier attempt is damaged" in said and "2 of " in said
    written = [piece for piece in pieces(run) if piece.startswith("model-")]
    assert written[0] == damaged.name and not any(name.startswith(("model-00001", "model-00003")) for name in written)
    assert equality(run)["passed"]


def test_what_another_checkpoint_left_unfinished_is_not_used(
    small_shards: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_shards
    with monkeypatch.context() as patch:
        stop = StopFlag()
        stop_after(patch, stop, "model-00001")
        with pytest.raises(Interrupted):
            exporting.export(run, 1, stop)
    shutil.rmtree(run.events)
    change(run, monkeypatch, dtype="bfloat16")
    exporting.export(run, 2, StopFlag())
    assert any(piece.startswith("model-00001") for piece in pieces(run))


def test_the_comparison_ends_with_its_time_budget_and_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    change(run, monkeypatch, equality_minutes=1e-9)
    words = exporting.export(run, 1, StopFlag())
    found = equality(run)
    assert found["passed"] and found["rows"] == 2 == run.plan()["micro_batch"], "one batch is always compared"
    assert 0 < found["tokens"] < found["tokens_at_most"]
    assert f"of {found['tokens']} tokens (of {found['tokens_at_most']:,}: the time budget ended)" in words
    (said,) = page._equality(run)
    assert f"on {found['tokens']:,} of {found['tokens_at_most']:,} held-out tokens" in said


def test_few_logits_are_stored(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftlib.export import equality as comparing

    monkeypatch.setattr(comparing, "STORED_BYTES", 100_000)
    exporting.export(run, 1, StopFlag())
    found = equality(run)
    assert 2 < found["rows"] < 36 and found["tokens"] * 97 * 4 < 110_000


def test_no_room_is_said_before_anything_is_merged(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftlib.export.merge import MergedTensors

    exporting.export(run, 1, StopFlag())
    shutil.rmtree(run.export / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    monkeypatch.setattr(MergedTensors, "take", lambda *_: pytest.fail("merged without room"))
    with pytest.raises(FtError, match="no space left for the merged weights"):
        exporting.export(run, 2, StopFlag())


def test_in_bfloat16_the_trained_model_computes_as_in_training(
    tmp_path: Path, trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast follows the plan's type of computing, not the device."""
    run = write_run(tmp_path / "the-run", Path(trained.provenance()["model_path"]), Path(trained.prepared()["dataset"]))
    set_numerics(run, compute_dtype="bfloat16")
    live(run, 1)
    casts: list[bool] = []
    real = exporting.logits_of
    monkeypatch.setattr(
        exporting, "logits_of", lambda *args, **options: casts.append(options.get("autocast", False))
        or real(*args, **options))  # fmt: skip
    exporting.export(run, 1, StopFlag())
    assert casts == [True, False] and equality(run)["passed"]


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
