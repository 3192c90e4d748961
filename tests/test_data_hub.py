"""Hub datasets: found where they were staged, refused in words where not, never imported on a login node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import modelfiles, recipe
from ftlib.data import hub
from ftlib.errors import InputError
from ftlib.spec import DataSpec
from tests.wishes import CHECKOUT, RECIPES, spec

ALPACA = DataSpec(hub="yahma/alpaca-cleaned")


def stage(home: Path, rows: int, commit: str = "0123abc", ref: str = "main", empty: int = 0) -> None:
    """A hub cache as `hf download` leaves it; `empty`: a row without output."""
    folder = home / "hub" / "datasets--yahma--alpaca-cleaned"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    made = [{"instruction": f"Add {n} and {n}.", "input": "", "output": str(2 * n)} for n in range(rows)]
    made[empty]["output"] = "" if empty else made[0]["output"]
    (folder / "snapshots" / commit / "alpaca_data_cleaned.json").write_text(json.dumps(made))
    (folder / "snapshots" / commit / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")


def fetched(home: Path, data: DataSpec) -> subprocess.CompletedProcess[str]:
    """`fetch` without a network, in an interpreter of its own: datasets reads its settings once."""
    code = (
        "import sys; from ftlib.data import hub; from ftlib.spec import DataSpec; from ftlib.errors import InputError\n"
        "try:\n rows = hub.fetch(DataSpec.model_validate_json(sys.argv[1])); print(len(rows), rows[-1]['output'])\n"
        "except InputError as error: print('refused:', error)"
    )
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", code, data.model_dump_json()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_downloaded_dataset_is_read_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="hub datasets need datasets: the train extra")
    stage(tmp_path, 40)
    stage(tmp_path, 30, commit="4567def", ref="small")
    small = fetched(tmp_path, ALPACA.model_copy(update={"revision": "small"}))
    assert small.stdout == "30 58\n", small.stderr
    assert fetched(tmp_path, ALPACA.model_copy(update={"revision": "0123abc"})).stdout == "40 78\n"
    wrong = fetched(tmp_path, ALPACA.model_copy(update={"split": "trian"})).stdout
    assert wrong.startswith("refused: data.hub: yahma/alpaca-cleaned (trian) could not be loaded") and "train" in wrong
    trees = fetched(tmp_path, ALPACA.model_copy(update={"revision": "small", "format": "oasst-messages"})).stdout
    assert "row 1: is no message of a tree" in trees


def test_a_few_empty_rows_are_left_out_and_said_and_many_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="hub datasets need datasets: the train extra")
    stage(tmp_path, 100, empty=7)
    said = fetched(tmp_path, ALPACA).stdout.splitlines()
    assert "left out 1 of 100 rows, such as" in said[0] and "row 8: field 'output' is empty" in said[0]
    assert said[1] == "99 198"
    stage(tmp_path, 10, commit="4567def", ref="small", empty=7)
    assert fetched(tmp_path, ALPACA.model_copy(update={"revision": "small"})).stdout.startswith("refused:")


def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_stage_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="hub datasets need datasets: the train extra")
    said = fetched(tmp_path, ALPACA).stdout
    for words in ("refused:", str(tmp_path), "the network was not tried", "hf download yahma/alpaca-cleaned", "DATA="):
        assert words in said


def test_the_login_node_asks_for_staging_where_nodes_have_no_internet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.hub: yahma/alpaca-cleaned is not at hand") as error:
        hub.check(ALPACA, hf_home=tmp_path, internet=False)
    assert "datasets--yahma--alpaca-cleaned" in str(error.value) and "--repo-type dataset" in str(error.value)
    assert hub.check(ALPACA, hf_home=tmp_path, internet=True)
    stage(tmp_path, 1)
    assert hub.check(ALPACA, hf_home=tmp_path, internet=False)
    with pytest.raises(InputError, match="--revision v2"):  # Another one is no help.
        hub.check(ALPACA.model_copy(update={"revision": "v2"}), hf_home=tmp_path, internet=False)


def test_a_cached_model_counts_where_it_is_of_the_revision_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    repository = tmp_path / "huggingface" / "hub" / "models--a--b"
    (repository / "snapshots" / "0123abc").mkdir(parents=True)
    (repository / "snapshots" / "0123abc" / "config.json").write_text('{"model_type": "llama"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    with pytest.raises(InputError, match=r"only in part at hand.*lacks tokenizer.json or .*make fetch MODEL="):
        modelfiles.locate("a/b", None, checkout=tmp_path, cache=tmp_path, internet=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (repository / "snapshots" / "0123abc" / name).touch()
    for revision in (None, "main", "0123abc"):
        found = modelfiles.locate("a/b", revision, checkout=tmp_path, cache=tmp_path, internet=False)
        assert found == modelfiles.ModelFiles("a/b", {"model_type": "llama"})
    with pytest.raises(InputError, match="a/b' is not at hand"):
        modelfiles.locate("a/b", "v2", checkout=tmp_path, cache=tmp_path, internet=False)


def test_checking_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "datasets", "tokenizers", "numpy", "pyarrow"}
    code = f"import sys, ftlib.data.hub; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"


def test_the_digest_follows_the_content() -> None:
    rows = [{"instruction": "a", "output": "b"}]
    assert hub.digest(rows) == hub.digest([{"output": "b", "instruction": "a"}])
    assert hub.digest(rows) != hub.digest([*rows, *rows])


def test_two_sources_and_a_name_that_is_none_are_refused() -> None:
    with pytest.raises(InputError, match="give one of path and hub"):
        recipe.load(RECIPES, "tiny", {"data.path": "a.jsonl", "data.hub": "yahma/alpaca-cleaned"})
    with pytest.raises(InputError, match="is no dataset's name"):
        recipe.load(RECIPES, "tiny", {"data.hub": "https://a/b"})


def test_another_revision_is_another_run() -> None:
    def name(**changes: object) -> str:
        return spec("llama-7b-alpaca", **changes).run_hash(data_digest="hub", cluster="c")

    assert len({name(), name(data__revision="v1"), name(data__split="test"), name(data__hub="a/b")}) == 4
