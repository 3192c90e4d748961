"""`make same-as`: it finds a difference, accepts an intended one, and says when an intended one is there no more."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("safetensors", reason="the training packages are not installed (make setup)")

import numpy as np
from safetensors.numpy import save_file

from benchmarks.same_as import results, trees
from benchmarks.same_as.compare import IntendedChanges, compare, difference, no_longer_there, read_intended

SCRIPT = "#!/bin/bash\n#SBATCH --mem=35G\n#SBATCH --partition=gpu\n#SBATCH --time=25\n"
NOTHING = IntendedChanges()


def intended(**entry: Any) -> IntendedChanges:
    """One intended change."""
    return IntendedChanges.model_validate({"changes": [{"reason": "it was wrong before", **entry}]})


def test_equal_parts_have_no_difference() -> None:
    parts = {"exit code": 0, "loss": {"1": 2.5}, "train.sbatch": SCRIPT}
    assert not any(result.lines for result in compare("qlora", parts, dict(parts), NOTHING))


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({"1": 2.5, "2": 2.25}, {"1": 2.5, "2": 2.2500000001}, ["-2: 2.25", "+2: 2.2500000001"]),
        ({"1": 2.5}, {"1": 2.5, "2": 2.25}, ["-2: None", "+2: 2.25"]),
        ("aa", "ab", ["-aa", "+ab"]),
        (None, "ab", ["+(not there then)"]),
        ("aa", None, ["-(not there now)"]),
    ],
)
def test_a_difference_is_shown(then: Any, now: Any, lines: list[str]) -> None:
    assert difference(then, now) == lines


def test_an_intended_line_is_accepted_and_the_one_beside_it_is_not() -> None:
    now = SCRIPT.replace("35G", "40G").replace("time=25", "time=30")
    entry = intended(case="* on a100", part="train.sbatch", lines=[r"[-+]#SBATCH --mem=\d+G"])
    (result,) = compare("tiny on a100", {"train.sbatch": SCRIPT}, {"train.sbatch": now}, entry)
    assert [line.text for line in result.lines if line.wrong] == ["-#SBATCH --time=25", "+#SBATCH --time=30"]
    assert result.reasons == ["it was wrong before"]
    only_memory = SCRIPT.replace("35G", "40G")
    (result,) = compare("tiny on a100", {"train.sbatch": SCRIPT}, {"train.sbatch": only_memory}, entry)
    assert result.lines and not result.wrong
    (elsewhere,) = compare("tiny on hipergator", {"train.sbatch": SCRIPT}, {"train.sbatch": only_memory}, entry)
    assert elsewhere.wrong


def test_an_intended_change_that_is_there_no_more_is_reported() -> None:
    entry = intended(case="*", part="train.sbatch", lines=[r"-#SBATCH --mem=35G", r"\+#SBATCH --mem=40G"])
    halfway = compare("tiny", {"train.sbatch": SCRIPT}, {"train.sbatch": SCRIPT.replace("35G", "36G")}, entry)
    (line,) = no_longer_there(halfway, entry)
    assert "--mem=40G" in line and "it was wrong before" in line
    assert len(no_longer_there(compare("tiny", {"a": 1}, {"a": 1}, entry), entry)) == 2


@pytest.mark.parametrize("points", ["", ", 5 points"])
def test_a_script_with_another_name_is_compared_with_the_one_it_was(points: str) -> None:
    renamed = [{"was": "export.sbatch", "now": "finish.sbatch", "reason": "one allocation serves both"}]
    changes = IntendedChanges.model_validate({"renamed": renamed})
    then, now = {f"export.sbatch{points}": SCRIPT}, {f"finish.sbatch{points}": SCRIPT.replace("gpu", "cpu")}
    (result,) = compare("tiny", then, now, changes)
    assert result.part == f"finish.sbatch{points}"
    assert [line.text for line in result.lines if line.wrong] == [
        "-#SBATCH --partition=gpu",
        "+#SBATCH --partition=cpu",
    ]


def test_the_file_of_intended_changes_is_valid_and_gives_reasons() -> None:
    assert all(entry.reason for entry in read_intended().changes)
    with pytest.raises(ValidationError):
        intended(case="*", part="*", line="a misspelled field")


def run_folder(folder: Path, *, loss: float = 2.5, weight: float = 1.0) -> Path:
    """What a finished run leaves, as far as it is compared."""
    rows = [{"step": 1, "loss": 3.0, "lr": 0.1, "seconds": 1.0, "life": 1}, {"step": 1, "eval_loss": 2.0}]
    rows.append({"step": 1, "loss": loss, "lr": 0.1, "seconds": 2.0, "life": 2})
    for part in ("export/adapter", "checkpoints/step-00000001", "dataset/train"):
        (folder / part).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "lo')
    for name in ("export/adapter/adapter_model", "checkpoints/step-00000001/adapter_model"):
        save_file({"a": np.full(3, weight, np.float32)}, folder / f"{name}.safetensors", {"written": str(folder)})
    (folder / "dataset" / "train" / "tokens.bin").write_bytes(b"123")
    (folder / "prepared.json").write_text(json.dumps({"dataset": str(folder / "dataset"), "digest": "of the code"}))
    return folder


def test_a_runs_parts_are_its_numbers_without_times_and_places(tmp_path: Path) -> None:
    one, same = (results.of_run(run_folder(tmp_path / name / "tiny-1")) for name in ("one", "same"))
    assert one == same
    assert one["loss"] == {"1": 2.5} and one["eval_loss"] == {"1": 2.0}
    assert {"dataset", "adapter", "trained weights", "lr"} <= one.keys()
    other = results.of_run(run_folder(tmp_path / "other" / "tiny-1", weight=1.0000001))
    assert {part for part in one if one[part] != other[part]} == {"adapter", "trained weights"}


def test_a_scripts_folders_and_run_ids_are_no_difference(tmp_path: Path) -> None:
    def printed(tree: Path, run: str) -> str:
        script = f"#SBATCH --job-name={run}.train\n#SBATCH --output={tree}/runs/{run}/log\nsrun --a=1 --b 2 python\n"
        return f"the plan\n\n===== train.sbatch =====\n{script}\nDry run: nothing was queued.\n"

    trees_and_runs = ((tmp_path / "then", "tiny-0123abcd"), (tmp_path / "now", "tiny-4567cdef"))
    then, now = (results.of_dry_run(printed(tree, run), tree) for tree, run in trees_and_runs)
    assert then["train.sbatch"] == now["train.sbatch"]
    assert "\n  --b\n" in now["train.sbatch"]
    assert (then["run id"], now["run id"]) == ("tiny-0123abcd", "tiny-4567cdef")


def test_an_unknown_commit_is_named(tmp_path: Path) -> None:
    with pytest.raises(trees.Trouble, match="COMMIT=no-such-commit"):
        trees.export_commit("no-such-commit", tmp_path)


def test_this_tree_is_copied_with_what_is_not_committed_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "ftlib").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(checkout)], check=True, timeout=60)
    (checkout / ".gitignore").write_text("runs/\n")
    (checkout / "ftlib" / "new.py").write_text("")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "log").write_text("")
    monkeypatch.setattr(trees, "CHECKOUT", checkout)
    trees.export_this_tree(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*")) == [".gitignore", "ftlib", "new.py"]
