"""What a trained model's tensors are in full precision, one at a time: merged with the adapter, or as they were
trained. Never more than four fp32 copies of one tensor are in memory."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from ftlib.errors import FtError
from ftlib.export.base import BaseTensors
from ftlib.spec import RunSpec
from ftlib.train.methods import TRAINED


class MergedTensors:
    """The trained model's tensors. The base is the one that was trained on, its rounding to 4 bit included: merging
    into the original weights, or rounding again, gives another model."""

    def __init__(
        self, spec: RunSpec, model_path: str, device: torch.device, trained: Path, cache: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """trained: the adapter's folder, or the checkpoint's where weights of the base itself were trained.
        cache: where training keeps 4-bit weights. dtype: what the training computed in. Raises InputError, FtError."""
        self.base = BaseTensors(spec, model_path, device, cache, dtype)
        self.dtype: torch.dtype = getattr(torch, spec.export.dtype)
        with torch.device("meta"):
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.base.config, dtype=self.dtype, trust_remote_code=False)
        rows = max((shape[0] for shape in self._vocabulary_shapes()), default=0)
        if rows > self.skeleton.get_input_embeddings().weight.shape[0]:
            self.skeleton.resize_token_embeddings(rows, mean_resizing=False)
        self.shapes = self.base.shapes
        self._adapted: Any = None
        self._trained: Any = None
        self._trained_names: set[str] = set()
        if spec.method.adapts:
            self._adapted = _adapter_over_meta(self.skeleton, trained, device)
        else:
            self._trained = safe_open(trained / TRAINED, framework="pt")
            self._trained_names = set(self._trained.keys())
            if unknown := self._trained_names - set(self.shapes):
                raise FtError(f"{trained / TRAINED} holds weights that the base has not: {sorted(unknown)[:5]}")

    def _vocabulary_shapes(self) -> list[torch.Size]:
        model = self.base.model
        weights = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        return [self.base.shapes[name] for name, weight in model.named_parameters() if id(weight) in weights]

    @torch.no_grad()
    def take(self, name: str) -> torch.Tensor:
        """The tensor in export.dtype, on the CPU. FtError where the adapter makes it infinite."""
        if name in self._trained_names:
            return self._trained.get_tensor(name).to(self.dtype)  # type: ignore[no-any-return]
        tensor = self.base.take(name)
        layer, _, leaf = name.rpartition(".")
        tuner = self._tuner(layer) if leaf == "weight" else None
        if tuner is not None:
            tensor = _merged(tuner, tensor.float(), name)
        return tensor.to(self.dtype).cpu()

    def _tuner(self, layer: str) -> Any:
        """peft's layer over the base's layer of that name; None where it has no adapter."""
        if self._adapted is None:
            return None
        module = self._adapted.get_submodule(layer)
        if isinstance(module, AuxiliaryTrainingWrapper):
            return module.token_adapter  # The rows of new tokens.
        return module if isinstance(module, BaseTunerLayer) else None


def _merged(tuner: Any, weight: torch.Tensor, name: str) -> torch.Tensor:
    """`weight` (fp32, used up) with the adapter's update, by peft's own merge."""
    base_layer = tuner.get_base_layer()
    empty = base_layer.weight
    base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    # In place. Its "safe" way takes one more copy, only to look for what is looked for below.
    tuner.merge(safe_merge=False)
    merged: torch.Tensor = base_layer.weight.data
    base_layer.weight = empty
    smallest, largest = torch.aminmax(merged)
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        raise FtError(f"{name}: the adapter makes infinite numbers or NaN of it; it seems to be broken")
    return merged


def _adapter_over_meta(skeleton: PreTrainedModel, folder: Path, device: torch.device) -> Any:
    """A copy of the skeleton with peft's layers, whose own weights (the adapter's, fp32) are on `device`, over a base
    that stays on the meta device. FtError for an adapter that is not merged."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.lora_bias:
        raise FtError(f"{folder}: only LoRA adapters without biases are merged; found {config.peft_type}")
    weights = load_peft_weights(str(folder), device=str(device))
    # peft would move them to the device of the base: here that is none.
    with mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None):
        adapted = PeftModel(copy.deepcopy(skeleton).float(), config, low_cpu_mem_usage=True)
        found = set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)
    own = [(name, weight) for name, weight in adapted.named_parameters() if "lora_" in name or "tokens_delta" in name]
    empty = [name for name, weight in own if weight.is_meta]
    if found.unexpected_keys or empty:
        raise FtError(f"{folder}: the adapter does not fit the base: {[*found.unexpected_keys, *empty][:5]}")
    return adapted.base_model.model
