"""With gradient checkpointing the backward pass ends at the first layer that is trained, and computes the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from transformers import PreTrainedModel

from benchmarks.lives import sha
from benchmarks.methods import METHODS
from ftlib import checkpoint
from ftlib.train import methods, trainer
from tests.test_methods import fresh, live, root
from tests.test_train import torch_as_it_was

__all__ = ["root", "torch_as_it_was"]
CHECKPOINTED = " train.steps=2 train.gradient_checkpointing=true optim.lr=0.01"
HEAD = ("tiny-llama3", "method.kind=freeze method.train_layers=[lm_head]")
# Which of the two layers a backward pass goes through, and whether it goes on to the embedding.
BACKWARD: dict[str, tuple[set[int], bool]] = {
    "qlora": ({0, 1}, False), "lora": ({0, 1}, False), "qlora, new tokens": ({0, 1}, True), "full": ({0, 1}, True),
    "freeze": ({1}, False), "freeze, head": (set(), False), "prompt, random": ({0, 1}, False),
    "two-stage": ({0, 1}, False), "falcon, qlora": ({0, 1}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD)
def test_no_backward_pass_runs_through_layers_below_the_first_trained_one(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, settings = {**METHODS, "freeze, head": HEAD}[name]
    reached: set[int] = set()
    embedded: set[bool] = set()
    attach = methods.attach

    def watched(base: PreTrainedModel, *args: Any) -> Any:
        layers = base.transformer.h if base.config.model_type == "falcon" else base.model.layers
        for number, layer in enumerate(layers):
            layer.register_full_backward_pre_hook(lambda *_, number=number: reached.add(number))
        model = attach(base, *args)
        # One that transformers registers later comes after ours; so the layer, which gets its result, is asked.
        layers[0].register_forward_pre_hook(lambda _, inputs: embedded.add(inputs[0].requires_grad))
        return model

    monkeypatch.setattr(methods, "attach", watched)
    run = fresh(root, f"backward-{name}", recipe, settings + CHECKPOINTED)
    live(run, 1)
    layers, to_the_embedding = BACKWARD[name]
    assert reached == layers
    if "prompt" not in name and name != "two-stage":  # A soft prompt stands among what goes into the first layer.
        assert embedded == {to_the_embedding}

    # As transformers leaves it: the same weights, by a longer way.
    monkeypatch.setattr(PreTrainedModel, "disable_input_require_grads", lambda self: None)
    whole = fresh(root, f"whole-{name}", recipe, settings + CHECKPOINTED)
    reached.clear()
    live(whole, 1)
    assert reached == {0, 1}
    assert sha(checkpoint.folder_for(run.checkpoints, 2)) == sha(checkpoint.folder_for(whole.checkpoints, 2))


def test_transformers_still_lets_go_of_the_embedding() -> None:
    """The two methods that this rests on, by name, so that an upgrade without them fails here."""
    assert callable(PreTrainedModel.disable_input_require_grads) and callable(trainer.FineTuner._prepare_for_training)
