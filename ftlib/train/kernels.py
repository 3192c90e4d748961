"""Which of PyTorch's kernels a stage may use: set once, before the first computation on a device."""

import os

import torch

from ftlib.plan.numerics import KernelSwitches

# The functions of one argument that torch computes on a CPU with MKL's vector math (torch/include/ATen/cpu/vml.h).
VECTOR_MATH = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh",
    "trunc")


def choose(switches: KernelSwitches, *, on_gpu: bool, deterministic: bool) -> None:
    """Set this process's kernel switches, before its first computation. On a CPU there are none but deterministic
    mode's."""
    settle_vector_math()
    if on_gpu and not switches.cudnn_attention:
        # cuDNN's attention, torch's first choice on H100 and newer, gives NaN gradients where a mask is given and the
        # rows are 64 tokens longer than a multiple of 128 (torch 2.13.0 with cuDNN 9.20: pytorch#196678, trl#7181).
        # Packed rows always have a mask. Memory-efficient attention takes its place.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        # cuBLAS reads it when its first handle is made. The batch script sets it, too.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Kernels chosen by how fast they happened to be may differ from one attempt to the next.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        # Filling fresh memory only helps code that reads what it never wrote, and costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False


def settle_vector_math() -> None:
    """Have MKL choose its kernel of each vector function in one thread, before the stage computes with several.

    It chooses in a function's first call. Where several threads make that call at once, each for its share of a tensor,
    now and then one of them computes its share with the low-accuracy kernel: 4 digits instead of 7, this once (MKL
    2024.2, which torch 2.13.0 brings: pytorch#188792). One number is computed by one thread."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in VECTOR_MATH:
            getattr(torch, name)(number)
