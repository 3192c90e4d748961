"""bf16 autocast, which every GPU computes in, on a CPU: each method learns, resumes to the bit and is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from benchmarks.lives import sha  # noqa: E402
from benchmarks.methods import HALF, METHODS, STEPS  # noqa: E402
from ftlib import checkpoint  # noqa: E402
from ftlib.export.run import export  # noqa: E402
from ftlib.metrics import read_metrics  # noqa: E402
from ftlib.rundir import RunDir  # noqa: E402
from ftlib.stop import StopFlag  # noqa: E402
from ftlib.train import methods  # noqa: E402
from tests.test_methods import fresh, live, root  # noqa: E402
from tests.test_train import torch_as_it_was  # noqa: E402
from tests.wishes import set_numerics  # noqa: E402

__all__ = ["root", "torch_as_it_was"]
# As in the recipes of large models: blocks are computed again in the backward pass.
SETTINGS = " train.gradient_checkpointing=true optim.lr=0.01"


def in_bf16(root: Path, name: str, method: str) -> RunDir:
    """A run on the CPU whose plan computes as on a GPU."""
    recipe, settings = METHODS[method]
    run = fresh(root, name, recipe, settings + SETTINGS)
    set_numerics(run, compute_dtype="bfloat16")
    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_in_bf16_resumes_to_the_bit_and_is_exported(
    method: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = methods.attach
    computed: set[torch.dtype] = set()

    def watched(base: Any, *args: Any) -> Any:
        frozen = {name: weight for name, weight in base.named_parameters() if weight.is_floating_point()}
        assert {weight.dtype for weight in frozen.values()} == {torch.bfloat16}, "the base is loaded as on a GPU"
        layers = base.transformer.h if base.config.model_type == "falcon" else base.model.layers
        for module in layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, __, output: computed.add(output.dtype))
        model = attach(base, *args)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        assert trained and {weight.dtype for weight in trained} == {torch.float32}, "what is trained stays in fp32"
        return model

    monkeypatch.setattr(methods, "attach", watched)
    whole, halved = in_bf16(root, "bf16-whole", method), in_bf16(root, "bf16-halved", method)
    live(whole, 1)
    live(halved, 1, HALF)
    live(halved, 2)
    assert computed == {torch.bfloat16}, "linear layers compute under autocast"
    losses = [[row["loss"] for row in read_metrics(run.metrics_file)] for run in (whole, halved)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    ends = [checkpoint.folder_for(run.checkpoints, STEPS) for run in (whole, halved)]
    assert sha(ends[0]) == sha(ends[1])
    export(whole, 1, StopFlag())
    equality = json.loads((whole.export / "equality.json").read_text())
    assert equality["passed"] and equality["tokens"] == equality["tokens_at_most"] > 100
