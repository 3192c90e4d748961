"""The base that was trained on, one tensor at a time: as training's own loader converts and quantizes it.

Nothing of the loading is written again here. `from_pretrained` builds training's skeleton on the meta device (the
quantized layers, the mapping from names in the files to names in the model, the dtypes) and is kept from filling it;
then transformers' loader is called with the file entries of one tensor at a time. So each tensor is the one that
training has, to the bit, whether its files are original or 4-bit weights that training kept."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict

from ftlib.data import tokenizing
from ftlib.errors import FtError
from ftlib.modelfiles import WEIGHTS, loading
from ftlib.spec import RunSpec
from ftlib.train.model import (
    BaseSource,
    added_noise,
    base_source,
    check_quantised,
    fill_added,
    linear_names,
    quantised_layers,
)


class BaseTensors:
    """The tensors of the base on the meta device, which `take` makes real, one at a time, in one pass."""

    def __init__(
        self, spec: RunSpec, model_path: str, device: torch.device, cache: Path | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Reads configuration and file headers only. cache: where training keeps 4-bit weights. dtype: what the
        training computed in, as for load_base.
        Raises InputError (missing files), FtError (a tensor is in no file, a layer is not quantized)."""
        transformers.utils.logging.disable_progress_bar()
        revision = spec.model.revision
        with loading(model_path, WEIGHTS, revision):
            self.config = AutoConfig.from_pretrained(model_path, revision=revision, trust_remote_code=False)
            self.source: BaseSource = base_source(
                spec, model_path, self.config, device, cache, dtype)
            skeleton = _skeleton(self.source)
            self.model = skeleton.model
            self._loading: LoadStateDictConfig = skeleton.loading
            # Slices of mapped files: what is read of them belongs to the page cache, not to this process.
            self._entries = _entries(skeleton.files)
        if spec.method.bits < 16:
            check_quantised(self.model, linear_names(self.config))
        self._quantized = quantised_layers(self.model)
        self.shapes: dict[str, torch.Size] = {}
        for name, tensor in _own_tensors(self.model):
            layer = self._quantized.get(name.rpartition(".")[0])
            is_weight = layer is not None and name.endswith(".weight")
            self.shapes[name] = torch.Size([layer.out_features, layer.in_features]) if is_weight else tensor.shape
        self._entries_of = self._grouped()
        if absent := [name for name in self.shapes if name not in self._entries_of]:
            raise FtError(f"{self.source.path}: no file holds {len(absent)} of the base's tensors, such as {absent[0]}")
        self._new_rows = _NewRows(spec, model_path, self.model) if spec.tokens.add else None
        if self._new_rows:
            self.shapes |= self._new_rows.shapes

    def take(self, name: str) -> torch.Tensor:
        """The tensor as training has it, on training's device: a quantized one dequantized, each in training's dtype.
        It is the caller's, who may change it. Raises FtError when the loader cannot convert it."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        empty = getattr(module, leaf)
        entries = {key: self._entries[key] for key in self._entries_of[name]}
        problems, _ = convert_and_load_state_dict_in_model(
            model=self.model, state_dict=entries, load_config=self._loading)
        if problems.conversion_errors or problems.mismatched_keys or problems.error_msgs:
            found = problems.conversion_errors or problems.mismatched_keys or problems.error_msgs
            raise FtError(f"{self.source.path}: {name} cannot be loaded: {str(found)[:300]}")
        tensor = getattr(module, leaf)
        if owner in self._quantized and leaf == "weight":
            # Where bitsandbytes' own integration in transformers dequantizes a whole model, it does so by this.
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            state = getattr(module, "state", None)  # An int8 layer's.
            result = dequantize_bnb_weight(tensor, state)
            if state is not None:
                state.SCB = None
        else:
            # A tensor that needed no conversion is the mapped file itself.
            result = tensor.detach().clone() if _is_mapped(tensor, entries) else tensor.detach()
        setattr(module, leaf, empty)
        return self._new_rows.put(name, result) if self._new_rows else result

    def _grouped(self) -> dict[str, list[str]]:
        """Entries of the files by the tensor they make, as transformers' loader would assign them."""
        mapping = self._loading.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, own = self.model.base_model_prefix, self.model.state_dict()
        grouped: dict[str, list[str]] = defaultdict(list)
        for key in self._entries:
            name, _ = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, _ = rename_source_key(key, [], [], prefix, own)
            grouped[name].append(key)
        return grouped


class _NewRows:
    """Rows for the added tokens in the embedding and, where it is a matrix of its own, the head."""

    def __init__(self, spec: RunSpec, model_path: str, model: PreTrainedModel) -> None:
        self._tokenizer = tokenizing.load(model_path, spec.model.revision, spec.tokens.add)
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        weights = {id(layer.weight) for layer in layers}
        own = [(name, tensor) for name, tensor in _own_tensors(model) if id(tensor) in weights]
        noises = added_noise(self._tokenizer, spec.train.seed, [tensor.shape[1] for _, tensor in own])
        self._noise = {name: noise for (name, _), noise in zip(own, noises, strict=True)}
        self.shapes: dict[str, torch.Size] = {}
        if not self._tokenizer.added:
            return
        for name, tensor in own:
            self.shapes[name] = torch.Size([max(len(self._tokenizer), tensor.shape[0]), tensor.shape[1]])

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with these rows; the same tensor where it has none."""
        if name not in self.shapes:
            return tensor
        if self.shapes[name] != tensor.shape:
            known, tensor = tensor, tensor.new_zeros(self.shapes[name])
            tensor[: len(known)] = known
        fill_added(tensor, self._tokenizer, self._noise[name])
        return tensor


@dataclass(frozen=True, kw_only=True)
class _Skeleton:
    """What `from_pretrained` had prepared when it was about to read weights."""

    model: PreTrainedModel
    files: list[str]
    loading: LoadStateDictConfig


def _skeleton(source: BaseSource) -> _Skeleton:
    """Training's model on the meta device. tests/test_export_merge.py names the two private methods that are replaced
    meanwhile: an upgrade of transformers that renames them fails there."""
    kept: list[_Skeleton] = []

    def keep(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: list[str], load_config: LoadStateDictConfig,
        expected_keys: Any = None,
    ) -> tuple[None, None]:
        kept.append(_Skeleton(model=model, files=checkpoint_files, loading=load_config))
        return None, None

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(keep)))
        stack.enter_context(
            mock.patch.object(PreTrainedModel, "_finalize_model_loading", staticmethod(lambda *_: None)))
        AutoModelForCausalLM.from_pretrained(source.path, **source.arguments, trust_remote_code=False)
    # It ties weights only when they are there.
    kept[0].model.tie_weights()
    return kept[0]


def _own_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers by name, each tied one once."""
    yield from model.named_parameters()
    saved = set(model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _entries(files: list[str]) -> dict[str, Any]:
    """What is in the files by name: slices of safetensors, mapped tensors of PyTorch's own format."""
    entries: dict[str, Any] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            entries |= load_state_dict(file)
            continue
        opened = safe_open(file, framework="pt")
        entries |= {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no dict)
    return entries


def _is_mapped(tensor: torch.Tensor, entries: dict[str, Any]) -> bool:
    """Whether the loader may have handed out the file's own memory instead of a copy."""
    dtypes = {str(entry.dtype).removeprefix("torch.") for entry in entries.values() if torch.is_tensor(entry)}
    dtypes |= {_DTYPES.get(entry.get_dtype(), "") for entry in entries.values() if not torch.is_tensor(entry)}
    return tensor.device.type == "cpu" and str(tensor.dtype).removeprefix("torch.") in dtypes


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
