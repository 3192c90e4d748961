"""The prepare stage: documents in packed rows hold exactly the examples, and are made once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="packing needs numpy: the train extra")
pytest.importorskip("transformers", reason="tokenising needs transformers: the train extra")

from ftlib.data import packing, sources, tokenizing  # noqa: E402
from ftlib.data.dataset import PackedRows, real_tokens  # noqa: E402
from ftlib.data.formats import render  # noqa: E402
from ftlib.data.prepare import prepare  # noqa: E402
from ftlib.errors import InputError, Interrupted  # noqa: E402
from ftlib.stop import StopFlag  # noqa: E402
from tests.tiny_llama import write_run, write_tokenizer  # noqa: E402
from tests.wishes import CHECKOUT  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a model's folder")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with bos")
    write_tokenizer(folder, bos=True)
    return folder


def documents(folder: Path) -> list[tuple[list[int], list[int]]]:
    """(ids, the ids that are targets) of every document in packed rows; padding is left out."""
    meta, arrays = packing.read(folder)
    found = []
    for row in range(meta["rows"]):
        tokens, response, positions = (arrays[name][row].tolist() for name in packing.FILES)
        starts = [at for at, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            assert positions[start:end] == list(range(end - start))
            targets = [token for token, flag in zip(tokens[start:end], response[start:end], strict=True) if flag]
            if targets:
                found.append((tokens[start:end], targets))
            else:
                assert end == len(tokens) and set(tokens[start:]) == {0}
    return found


def test_packing_takes_every_document_once_and_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 3000)
    rows = packing.best_fit_decreasing(lengths, 512, seed=1)
    assert sorted(document for row in rows for document in row) == list(range(3000))
    sums = [int(lengths[row].sum()) for row in rows]
    assert max(sums) <= 512 and lengths.sum() / (512 * len(rows)) > 0.995
    assert (
        rows == packing.best_fit_decreasing(lengths, 512, seed=1) != packing.best_fit_decreasing(lengths, 512, seed=2)
    )
    # Best fit: the 3 goes beside the 7, not beside the 5.
    assert sorted(map(sorted, packing.best_fit_decreasing(np.array([7, 5, 3]), 10, seed=0))) == [[0, 2], [1]]


@pytest.mark.parametrize("bos", [False, True])
def test_packed_documents_are_the_examples_with_the_response_as_target(
    tmp_path: Path, model: Path, model_with_bos: Path, bos: bool
) -> None:
    run = write_run(tmp_path / "run", model_with_bos if bos else model, data__pairs=60, data__seq_len=256)
    prepared = prepare(run, StopFlag())
    tokenizer = tokenizing.load(str(model_with_bos if bos else model))
    made = sources.read(run.spec().data, None, test_pairs=run.spec().evaluate.pairs)
    for part, rows in (("train", made.train), ("validation", made.validation)):
        found = documents(Path(prepared["dataset"]) / part)
        examples = [render(row, "brief") for row in rows]
        whole = Counter(("<s>" if bos else "") + e.prompt + e.response + "</s>" for e in examples)
        assert Counter(tokenizer.hf.decode(ids) for ids, _ in found) == whole
        assert Counter(tokenizer.hf.decode(ids) for _, ids in found) == Counter(e.response + "</s>" for e in examples)
        # What the model is asked with is what it was trained on, to the id.
        prompts = tokenizer.prompts([e.prompt for e in examples])
        assert Counter(map(tuple, prompts)) == Counter(tuple(ids[: -len(targets)]) for ids, targets in found)
        assert prompts == tokenizer.hf([e.prompt for e in examples]).input_ids
        counts = prepared[part]
        assert counts["examples"] == len(rows) and counts["tokens"] == sum(len(ids) for ids, _ in found)
        assert counts["response_tokens"] == sum(len(targets) for _, targets in found)


def test_the_test_set_says_what_is_asked_and_expected(tmp_path: Path, model: Path) -> None:
    prepared = prepare(write_run(tmp_path / "run", model, data__pairs=20, data__seq_len=256), StopFlag())
    lines = [json.loads(line) for line in (Path(prepared["dataset"]) / "test.jsonl").read_text().splitlines()]
    assert len(lines) == prepared["test"] == 256 + sources.UNSEEN_PAIRS
    for line in lines:
        assert json.loads(line["response"]) == {"function_call": line["expected_call"]}
        assert line["example_call"]["name"] == line["expected_call"]["name"]
        assert json.dumps(line["example_call"], separators=(",", ":")) in line["prompt"]


def test_a_second_run_reuses_the_dataset_and_another_wish_does_not(tmp_path: Path, model: Path) -> None:
    first = prepare(write_run(tmp_path / "a", model, data__pairs=20), StopFlag())
    again = write_run(tmp_path / "b", model, data__pairs=20, optim__lr=0.001)
    second = prepare(again, StopFlag())
    assert (first["reused"], second["reused"]) == (False, True)
    assert {**first, "seconds": 0, "reused": 0} == {**second, "seconds": 0, "reused": 0}
    assert again.prepared() == second
    other = prepare(write_run(tmp_path / "c", model, data__pairs=20, data__seed=1), StopFlag())
    assert not other["reused"] and other["dataset"] != first["dataset"]


def test_a_dataset_that_lost_a_file_or_was_cut_is_made_anew(tmp_path: Path, model: Path) -> None:
    first = prepare(write_run(tmp_path / "a", model, data__pairs=20), StopFlag())
    tokens = Path(first["dataset"]) / "train" / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    second = prepare(write_run(tmp_path / "b", model, data__pairs=20), StopFlag())
    assert not second["reused"] and tokens.read_bytes() == whole


def test_two_at_once_both_end_with_the_one_dataset(tmp_path: Path, model: Path) -> None:
    runs = [write_run(tmp_path / name, model, data__pairs=200) for name in "abc"]
    threads = [threading.Thread(target=prepare, args=(run, StopFlag())) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert len({run.prepared()["dataset"] for run in runs}) == 1
    assert [path.name for path in (tmp_path / "cache" / "datasets").iterdir()] == [runs[0].prepared()["digest"]]


def test_rows_that_are_too_long_are_dropped_counted_and_said(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    long = [{"prompt": f"{n} " * 200, "response": "long"} for n in range(40)]
    short = [{"prompt": f"{n}? ", "response": "short"} for n in range(400)]
    path.write_text("\n".join(map(json.dumps, long + short)))
    prepared = prepare(write_run(tmp_path / "run", model, path, data__seq_len=64, data__held_out=0.2), StopFlag())
    train, validation = prepared["train"], prepared["validation"]
    dropped = train["dropped_too_long"]
    assert dropped > 0 and train["examples"] + validation["examples"] + prepared["test"] == 400
    assert f"train: dropped {dropped} examples longer than data.seq_len=64 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"all \d+ train examples are longer than data.seq_len=16 tokens"):
        path.write_text("\n".join(map(json.dumps, long)))
        prepare(write_run(tmp_path / "run 2", model, path, data__seq_len=16, data__held_out=0.4), StopFlag())


def test_held_out_examples_that_are_all_too_long_are_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"{n}? ", "response": "short"} for n in range(40)]
    long = {"prompt": "40? ", "response": "long " * 200}
    held_out = sources.HELD_OUT
    parts = sources.Sources(rows[:30], rows[30:], [(held_out, long), ("unseen", rows[0])])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sources, "read", lambda *_, **__: parts)
        with pytest.raises(InputError, match=r"every held-out example is longer than data.seq_len=64 tokens"):
            prepare(write_run(tmp_path / "run", model, None, data__seq_len=64), StopFlag())


def test_a_file_that_changed_since_submitting_is_refused(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": str(n), "response": "x"}) for n in range(400)))
    run = write_run(tmp_path / "run", model, path)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(InputError, match="has changed since the run was submitted"):
        prepare(run, StopFlag())


def test_a_stop_leaves_nothing_half_written(tmp_path: Path, model: Path) -> None:
    run = write_run(tmp_path / "run", model, data__pairs=20)
    stop = StopFlag()
    stop.cause = "preemption"
    with pytest.raises(Interrupted, match="preemption"):
        prepare(run, stop)
    assert not list((tmp_path / "cache" / "datasets").iterdir()) and not run.prepared_file.exists()
    assert prepare(run, StopFlag())["test"]


def test_missing_tokenizer_files_are_named_with_how_to_stage_them(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"lacks tokenizer.json or tokenizer.model.*hf download .*model\.name="):
        tokenizing.load(str(tmp_path / "m"))
    with pytest.raises(InputError, match="is no folder"):
        tokenizing.load(str(tmp_path / "n"))
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        tokenizing.load(str(tmp_path / "m"))


def test_packed_rows_are_tensors_with_labels_on_responses_alone(tmp_path: Path, model: Path) -> None:
    torch = pytest.importorskip("torch", reason="tensors need torch: the train extra")
    prepared = prepare(write_run(tmp_path / "run", model, data__pairs=20, data__seq_len=256), StopFlag())
    folder = Path(prepared["dataset"]) / "train"
    rows: Any = PackedRows(folder)
    meta, arrays = packing.read(folder)
    assert len(rows) == meta["rows"]
    batch = torch.utils.data.default_collate([rows[index] for index in range(len(rows))])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert all(value.dtype == torch.int64 and value.shape == (len(rows), 256) for value in batch.values())
    flags = torch.from_numpy(arrays["response"].astype(bool))
    assert (batch["labels"][flags] == batch["input_ids"][flags]).all() and (batch["labels"][~flags] == -100).all()
    assert real_tokens(batch) == meta["tokens"]


def test_a_model_of_the_hub_that_cannot_be_had_says_where_it_was_looked_for(tmp_path: Path) -> None:
    code = (
        "from ftlib.data import tokenizing; from ftlib.errors import InputError\n"
        "try: tokenizing.load('meta-llama/Llama-2-7b-hf')\nexcept InputError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for words in (
        f"Looked for tokenizer.json or tokenizer.model and tokenizer_config.json in the cache {tmp_path}/hub",
        "the network was not tried (HF_HUB_OFFLINE is set)",
        "hf download meta-llama/Llama-2-7b-hf --local-dir /path/to/Llama-2-7b-hf",
        'SET="model.name=/path/to/Llama-2-7b-hf"',
    ):
        assert words in done.stdout
