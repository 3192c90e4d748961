"""Import the heavy libraries without what a training never uses: each life waits for its imports.
Must be imported before transformers' Trainer, peft and bitsandbytes, else it changes nothing."""

import importlib
from importlib.util import find_spec
from typing import Any

import torch
import transformers.utils


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return (lambda later: later) if function is None else function


# Our rows are memory-mapped files: without it the Trainer does not load datasets and pandas (0.4 s).
transformers.utils.is_datasets_available = lambda: False
if find_spec("bitsandbytes"):
    # Its fallback kernels ask for torch.compile, which loads a compiler (1 s); CPU and CUDA have their own kernels.
    compiled, torch.compile = torch.compile, _uncompiled
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compiled
