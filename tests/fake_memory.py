"""How many bytes a training step of a large model holds at once, counted without holding them.

Fake tensors have shapes and storages of no memory, and what is alive of them is added up. They are fake CPU tensors: a
fake backward pass on "cuda" needs a torch that is linked with CUDA. torch's own MemTracker hooks every parameter's
gradient, which the frozen ones of an adapter's base do not have.
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora.layer import LoraLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from ftlib.spec import RunSpec
from ftlib.train.model import attach_adapter


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live. `peak`: the most at once, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            # A view, or a result in place, has its input's storage.
            if isinstance(leaf, torch.Tensor) and (key := self._key(leaf)) not in self._known | given:
                storage = leaf.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Dequantised(torch.autograd.Function):
    """x @ W.T with W unpacked to bf16 for the moment, in both passes, as bitsandbytes' MatMul4Bit."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return torch.nn.functional.linear(x, torch.empty(shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ torch.empty(ctx.shape, dtype=gradients[0].dtype), None, None


class FourBit(torch.nn.Linear):
    """Stands for bitsandbytes' Linear4bit, whose weight cannot be a fake tensor: half a byte a weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = torch.nn.Parameter(
            torch.empty(linear.weight.numel() // 2, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # It computes in bf16; autocast does not reach its own function.
        output: torch.Tensor = _Dequantised.apply(
            x.to(torch.bfloat16), self.weight, (self.out_features, self.in_features))
        # peft's layer for 4 bit copies the base's result; its layer for plain weights, used here, does not.
        return output.clone()


def training_step_gib(config: dict[str, Any], spec: RunSpec, micro_batch: int) -> float:
    """Peak of one forward and backward pass of QLoRA in bf16 autocast beyond weights and adapter, in GiB, of the model
    that `config` (a config.json's content) describes."""
    rows = (micro_batch, spec.data.seq_len)
    # Under autocast peft's layer for 4 bit does not copy inputs to fp32.
    peft_as_for_4_bit = mock.patch.object(LoraLayer, "_cast_input_dtype", lambda self, x, dtype: x)
    with peft_as_for_4_bit, FakeTensorMode(allow_non_fake_inputs=True):
        model = _adapted(config, spec)
        ids = torch.zeros(rows, dtype=torch.long)
        mask = _mask(rows)
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, position_ids=ids, attention_mask=mask).loss
            loss.backward()
    return live.peak / 2**30


def _mask(rows: tuple[int, int]) -> torch.Tensor:
    """What keeps the documents of packed rows apart, as transformers makes it of position ids."""
    return torch.ones((rows[0], 1, rows[1], rows[1]), dtype=torch.bool)


def _adapted(config: dict[str, Any], spec: RunSpec) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FourBit(module))
    model.config.use_cache = False
    # Everything is on one device already, and a fake weight cannot be swapped for a moved one.
    with mock.patch.object(torch.nn.Module, "to", lambda self, *_: self):
        adapted = attach_adapter(model, spec.method, 0)
    if spec.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return adapted.train()
