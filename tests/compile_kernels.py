"""Compile Liger's kernels for a GPU that is not there: python compile_kernels.py 90 100. Needs triton and liger-kernel.

Triton translates down to machine code with the assembler that its wheel brings; only starting a kernel needs a driver.
Types and sizes are those of Llama-2-7B in bf16. A line of JSON for each kernel and architecture: name, sm, cubin bytes.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HIDDEN, INTERMEDIATE, HEADS, WIDTH = 4096, 11008, 32, 128
COMMON: dict[str, Any] = {"casting_mode": 0, "elementwise_affine": True, "BLOCK_SIZE": 4096, "COMPUTE_DW": True,
                          "X_dtype": tl.bfloat16}  # fmt: skip
KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("rms_norm", "_rms_norm_forward_kernel", COMMON),
    ("rms_norm", "_rms_norm_backward_kernel", COMMON),
    ("swiglu", "_swiglu_forward_kernel", {"n_cols": INTERMEDIATE, "BLOCK_SIZE": 16384}),
    ("swiglu", "_swiglu_backward_kernel", {"n_cols": INTERMEDIATE, "BLOCK_SIZE": 16384}),
    ("rope", "_triton_rope", {
        "bs": 8, "cos_bs": 1, "n_qh": HEADS, "n_kh": HEADS, "hd": WIDTH, "pad_n_qh": HEADS, "pad_n_kh": HEADS,
        "pad_hd": WIDTH, "pad_rd": WIDTH, "rd": WIDTH, "BLOCK_SIZE": HEADS, "BACKWARD_PASS": False}),
    ("cross_entropy", "liger_cross_entropy_kernel", {
        "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "sum", "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "BLOCK_SIZE": 32768, "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True}),
    ("cross_entropy", "element_mul_kernel", {"BLOCK_SIZE": 32768, "X_col_stride": 1}),
]
# Pointers to other types than bf16, and plain numbers that are no 32-bit integers.
TYPES = {
    "RSTD_ptr": "*fp32", "dW_ptr": "*fp32", "loss_ptr": "*fp32", "cos": "*bf16", "sin": "*bf16", "eps": "fp32",
    "offset": "fp32", "softcap": "fp32", "sum_non_ignore_weight": "fp32", "weight_sum": "fp32",
    "gate_multiplier": "fp32"}


def type_of(module: str, name: str) -> str:
    """The type of an argument, as Triton writes it."""
    if (module, name) == ("cross_entropy", "Y_ptr"):
        return "*i64"  # the targets; elsewhere Y is an output
    return TYPES.get(name) or ("*bf16" if name.endswith("_ptr") else "i32")


def main() -> None:
    for module, name, constants in KERNELS:
        kernel = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
        own = {p.name: constants[p.name] for p in kernel.params if p.is_constexpr}
        signature = {p.name: "constexpr" if p.is_constexpr else type_of(module, p.name) for p in kernel.params}
        for architecture in sys.argv[1:]:
            source = ASTSource(fn=kernel, signature=signature, constexprs=own)
            compiled = triton.compile(source, target=GPUTarget("cuda", int(architecture), 32))
            print(json.dumps({"kernel": name, "sm": architecture, "bytes": len(compiled.asm["cubin"])}), flush=True)


if __name__ == "__main__":
    main()
