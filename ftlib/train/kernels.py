"""Which of PyTorch's kernels a stage may use: set once, before the first computation on a device."""

import os

import torch

from ftlib.plan.numerics import KernelSwitches


def choose(switches: KernelSwitches, *, on_gpu: bool, deterministic: bool) -> None:
    """Set this process's kernel switches. On a CPU there are none but deterministic mode's."""
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
