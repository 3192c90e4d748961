"""A model's folder is data from strangers: nothing in it is ever run, whoever answers whether it may be."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.errors import InputError
from tests.wishes import CHECKOUT, copied_checkout, spec

# Methods that can load code, and take trust_remote_code. GenerationConfig and peft's classes load none
# and would take the argument for a field.
CODE_LOADERS = {"from_pretrained", "from_config"}
LOAD_NO_CODE = {"GenerationConfig", "PeftConfig", "PeftModel", "shapes"}
PAYLOAD = "import os, pathlib\npathlib.Path(os.environ['FT_TEST_PAYLOAD']).write_text('it ran')\n"


def calls_without_refusal(source: str) -> list[str]:
    """Calls in Python source that may load a model's own code and do not refuse it: 'LINE: CALL'."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in CODE_LOADERS or ast.unparse(node.func.value) in LOAD_NO_CODE:
            continue
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if said.get("trust_remote_code") != "False":
            found.append(f"{node.lineno}: {ast.unparse(node.func)}")
    return found


@pytest.mark.parametrize("room", ["ftlib", "jobs"])
def test_every_call_that_could_load_a_models_code_refuses_it(room: str) -> None:
    files = sorted((CHECKOUT / room).rglob("*.py"))
    assert files
    wrong = {str(file): calls for file in files if (calls := calls_without_refusal(file.read_text(encoding="utf-8")))}
    assert wrong == {}, "these calls need trust_remote_code=False"


def test_the_look_for_such_calls_sees_them() -> None:
    assert calls_without_refusal("AutoModel.from_pretrained(path, dtype=kind)") == ["1: AutoModel.from_pretrained"]
    assert calls_without_refusal("AutoModel.from_config(c, trust_remote_code=trust)")
    assert not calls_without_refusal("x = AutoModel.from_pretrained(path, trust_remote_code=False)")


def hostile_tokenizer(folder: Path) -> None:
    """Its tokenizer is a class of its own."""
    code = f"{PAYLOAD}from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    (folder / "tokenization_own.py").write_text(code)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def hostile_architecture(folder: Path) -> None:
    """Its architecture is a class of its own."""
    code = f"{PAYLOAD}from transformers import LlamaConfig\nclass Own(LlamaConfig): model_type = 'own'\n"
    (folder / "configuration_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))


class Command:
    """A pickle that runs PAYLOAD when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (PAYLOAD,)


def hostile_weights(folder: Path) -> None:
    """Its weights are a pickle, in the format that torch wrote until 2020."""
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Command()):
            pickle.dump(part, file, protocol=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound model's folder, to be spoiled."""
    folder = tmp_path / "model"
    shutil.copytree(CHECKOUT / "models" / "tiny-base", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("spoil", [hostile_tokenizer, hostile_architecture, hostile_weights])
def test_code_in_a_models_folder_is_not_run(
    spoil: object, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    from ftlib.data import tokenizing
    from ftlib.train.model import load_base

    assert callable(spoil)
    spoil(model)
    payload = tmp_path / "payload"
    monkeypatch.setenv("FT_TEST_PAYLOAD", str(payload))
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 10))
    with pytest.raises(InputError, match=r"model\.name") as refused:
        tokenizing.load(str(model))
        load_base(spec(method__kind="lora"), str(model), torch.device("cpu"))
    assert not payload.exists()
    assert ("besides tensors" if spoil is hostile_weights else "such code is never run here") in str(refused.value)


@pytest.mark.slow
def test_a_run_refuses_a_model_that_needs_its_own_code_whatever_stdin_answers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    hostile_tokenizer(model)
    payload = tmp_path / "payload"
    words = ["submit", "--model", "tiny", "--cluster", "local", "--set", f"model.name={model} data.pairs=20"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=copied_checkout(tmp_path),
        env={**os.environ, "FT_TEST_PAYLOAD": str(payload)},
        input="yes\n" * 100,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 64, done.stdout + done.stderr
    assert "model.name" in done.stderr and "such code is never run here" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not payload.exists()


def test_a_stage_reads_nothing_from_the_shell_that_submitted_it() -> None:
    program = "from jobs import stage; stage._close_stdin(); print(repr(input()))"
    for stdin in ("yes\n", None):
        closing = "import os; os.close(0); " if stdin is None else ""
        done = subprocess.run(
            [sys.executable, "-c", closing + program],
            cwd=CHECKOUT,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "EOFError" in done.stderr and done.stdout == ""
