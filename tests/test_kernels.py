"""The kernel switches that a stage sets, and what of a GPU's state a checkpoint keeps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import Trainer  # noqa: E402
from transformers.training_args import ParallelMode  # noqa: E402

from ftlib.evaluate import answering, evaluate  # noqa: E402
from ftlib.plan import numerics  # noqa: E402
from ftlib.plan.numerics import KernelSwitches, Numerics  # noqa: E402
from ftlib.train import kernels  # noqa: E402
from ftlib.train.arguments import prepare_process  # noqa: E402
from tests.test_train import torch_as_it_was  # noqa: E402
from tests.wishes import planned, site, spec  # noqa: E402

__all__ = ["torch_as_it_was"]
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def switches_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS, raising=False)
    for switch in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, switch, getattr(torch.backends.cudnn, switch))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def prepared(monkeypatch: pytest.MonkeyPatch, stage: str, **changes: Any) -> Any:
    """What prepare_process returns for a stage on a GPU, of which there is none here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return prepare_process(on_gpu(**changes), stage, {"gpus_per_node": 1})


def on_gpu(**changes: Any) -> Numerics:
    """The numerics of a run of the tiny recipe, planned for a GPU."""
    asked = spec(**changes)
    begun = numerics.first(asked, planned(asked, site("a100")).model_dump(mode="json"), {})
    return begun.model_copy(update={"threads": torch.get_num_threads()})


@pytest.mark.parametrize("stage", ["train", "export"])
def test_cudnn_attention_is_off_on_a_gpu(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert prepared(monkeypatch, stage).type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled(), "on a GPU a field of the recipe"


def test_cudnn_attention_is_off_in_an_evaluation_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):
        pass

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(answering, "load", load)
    run: Any = SimpleNamespace(spec=spec, numerics=on_gpu)
    subject = evaluate.Subject("base", "nowhere")
    tokenizer: Any = None
    stop: Any = None
    with pytest.raises(Loaded):
        next(evaluate._answer(subject, [], {}, set(), tokenizer, run, stop))
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_on_a_gpu_sets_all_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cudnn.benchmark = True
    prepared(monkeypatch, "train", train__deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention is deterministic only when it must be"
    assert os.environ[CUBLAS] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_on_a_cpu_attention_is_left_alone() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    kernels.choose(KernelSwitches(), on_gpu=False, deterministic=True)
    assert torch.backends.cuda.cudnn_sdp_enabled() and torch.are_deterministic_algorithms_enabled()


class Calls(TorchDispatchMode):
    """Remembers what torch computes: the function's name, the type of its first tensor and how many numbers it has."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[str, Any, int]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.made.add((function.overloadpacket.__name__, args[0].dtype, args[0].numel()))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("deterministic", [True, False])
def test_one_thread_makes_the_first_call_of_every_vector_function(deterministic: bool) -> None:
    """Two threads that make it together compute a share of the numbers to four digits, now and then: pytorch#188792."""
    header = Path(torch.__file__).parent / "include/ATen/cpu/vml.h"
    names = re.findall(r"^IMPLEMENT_VML_MKL\((\w+),", header.read_text(), flags=re.MULTILINE)
    assert {"cos", "sin", "sqrt", "exp"} < set(names), "what torch computes with MKL's vector math, of this version"
    with Calls() as calls:
        kernels.choose(KernelSwitches(), on_gpu=False, deterministic=deterministic)
    assert {(name, dtype, 1) for name in names for dtype in (torch.float32, torch.float64)} <= calls.made


@pytest.mark.nightly
def test_no_first_call_in_several_threads_is_wrong() -> None:
    """Without it about one in a thousand was wrong, on two busy cores of a Xeon."""
    command = [sys.executable, "-m", "tests.first_calls", "5000"]
    passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    checkout = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=checkout, env=passive, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "0", done.stdout + done.stderr


@pytest.mark.parametrize("mode", [ParallelMode.NOT_DISTRIBUTED, ParallelMode.DISTRIBUTED])
def test_a_gpus_random_numbers_are_kept_and_put_back(
    mode: ParallelMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout on a GPU draws from its own generator. The file is the Trainer's: this names what we rely on."""
    several = mode is ParallelMode.DISTRIBUTED
    states = [torch.tensor([7, 8], dtype=torch.uint8), torch.tensor([9], dtype=torch.uint8)]
    put_back: list[Any] = []
    for place in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(place, "get_rng_state", lambda *_: states[0])
        monkeypatch.setattr(place, "get_rng_state_all", lambda: states)
        monkeypatch.setattr(place, "set_rng_state", lambda state, *_: put_back.append(state))
        monkeypatch.setattr(place, "set_rng_state_all", lambda found: put_back.extend(found))
    args = SimpleNamespace(parallel_mode=mode, world_size=2 if several else 1, process_index=1)
    trainer: Any = SimpleNamespace(args=args)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        Trainer._save_rng_state(trainer, str(tmp_path))
        Trainer._load_rng_state(trainer, str(tmp_path))
    expected = states if several else states[:1]
    assert [state.tolist() for state in put_back] == [state.tolist() for state in expected]
