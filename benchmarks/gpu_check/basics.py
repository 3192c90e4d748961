"""The first minute: versions, and whether single operations compute on this device what fp32 computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.results import Recorder, Skip, Wrong

# Relative L2 error that rounding to bf16 explains: 2^-9 a factor, a few factors one after another.
BF16_ERROR = 0.02
BACKENDS = {
    "math": SDPBackend.MATH, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION}


def run(recorder: Recorder) -> None:
    """All checks of this group."""
    device = torch.device(recorder.device)
    recorder.check("versions and device", lambda: versions(device), correctness=False)
    recorder.check("NF4 bytes, CPU and device", lambda: nf4_bytes(device), correctness=True)
    for name, backend in BACKENDS.items():
        recorder.check(
            f"packed attention, {name}", lambda backend=backend: packed_attention(device, backend), correctness=True)
    recorder.check("packed attention, as chosen", lambda: packed_attention(device, None), correctness=True)
    recorder.check("varlen attention", lambda: varlen_attention(device), correctness=True)
    recorder.check("chunked loss", lambda: chunked_loss(device), correctness=True)
    recorder.check("linear_cross_entropy", lambda: linear_cross_entropy(device), correctness=False)
    recorder.check("cuDNN attention, NaN gradient", lambda: cudnn_nan(device, cudnn=True), correctness=False)
    recorder.check("the same without cuDNN", lambda: cudnn_nan(device, cudnn=False), correctness=True)
    for heads in ("71 query heads, 1 key head", "71 query heads, 71 key heads"):
        recorder.check(f"Falcon's kernel, {heads}", lambda heads=heads: falcon_kernel(device, heads), correctness=False)
    recorder.check("Falcon's kernel, as it is trained", lambda: falcon_twin(device), correctness=True)


def versions(device: torch.device) -> dict[str, Any]:
    """Driver, device, and what this torch has code for."""
    values: dict[str, Any] = {
        "cuda of torch": torch.version.cuda, "arch list": torch.cuda.get_arch_list(),
        "cudnn": torch.backends.cudnn.version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        values["memory GiB"] = round(properties.total_memory / 2**30, 1)
        values["bf16 product, TFLOP/s"] = product_tflops(device)
        try:
            import pynvml

            pynvml.nvmlInit()
            values["driver"] = pynvml.nvmlSystemGetDriverVersion()
        except Exception as error:  # NVML's errors are its own classes
            values["driver"] = f"not known: {error}"
    return values


def product_tflops(device: torch.device) -> float:
    """bf16 matrix product, measured: what shares of the peak are of."""
    size, times = 8192, 20
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        left @ right
    torch.cuda.synchronize()
    return round(times * 2 * size**3 / (time.perf_counter() - began) / 1e12, 1)


def nf4_bytes(device: torch.device) -> dict[str, Any]:
    """Quantised on the CPU and on the device, the same bytes: a base that is kept is the base that is computed."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.02
    options = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    host, host_state = quantize_4bit(weight, **options)
    there, there_state = quantize_4bit(weight.to(device), **options)
    differing = int((host.view(torch.uint8).cpu() != there.view(torch.uint8).cpu()).sum())
    constants = int((host_state.absmax.cpu() != there_state.absmax.cpu()).sum())
    back = dequantize_4bit(there, there_state).cpu().float()
    error = relative(back, dequantize_4bit(host, host_state).float())
    values = {"bytes": host.numel(), "bytes that differ": differing, "constants that differ": constants,
              "relative error of the values": error}  # fmt: skip
    if differing or constants:
        raise Wrong("the CPU and the device quantise to other bytes", values)
    return values


def packed_inputs(
    device: torch.device, *, heads: int = 8, key_heads: int = 8, length: int = 512, width: int = 128
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """q, k, v of shape (1, heads, length, width) in bf16 that require gradients; the mask of four packed documents,
    (1, 1, length, length) bool; and where documents start, with the end, (5,) int32."""
    generator = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, length // 8, length // 2, length - length // 8, length], dtype=torch.int32)
    document = torch.bucketize(torch.arange(length), bounds[1:-1].long(), right=True)
    mask = (document[:, None] == document[None, :]).tril()[None, None]

    def tensor(count: int) -> torch.Tensor:
        values = torch.randn(1, count, length, width, generator=generator)
        return values.to(device, torch.bfloat16).requires_grad_()

    return (tensor(heads), tensor(key_heads), tensor(key_heads)), mask.to(device), bounds.to(device)


def gradients(
    attend: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output of `attend` and the gradients of its inputs, in fp32."""
    copies = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    output = attend(*copies)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
    found = torch.autograd.grad((output.float() * weights).sum(), copies)
    return [tensor.detach().float() for tensor in (output, *found)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, both as one vector."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def judged(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float = BF16_ERROR) -> dict[str, Any]:
    """Relative errors of output and gradients; Wrong where one is beyond `limit` or not finite."""
    names = ("output", "dq", "dk", "dv")
    values = {name: round(relative(*pair), 5) for name, *pair in zip(names, found, expected, strict=False)}
    if not all(error <= limit for error in values.values()):  # NaN is not <= either
        raise Wrong(f"beyond {limit:g} of fp32", values)
    return values


def packed_attention(device: torch.device, backend: SDPBackend | None) -> dict[str, Any]:
    """Attention of packed documents in bf16 by one of torch's kernels, beside fp32. None: torch chooses."""
    inputs, mask, _ = packed_inputs(device)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*tensors, attn_mask=mask)

    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(attend, inputs, torch.float32)
    if backend is None:
        return judged(gradients(attend, inputs, torch.bfloat16), expected) | {"kernel": kernel(attend, inputs)}
    try:
        with sdpa_kernel(backend):
            found = gradients(attend, inputs, torch.bfloat16)
    except RuntimeError as error:
        if no_kernel(error):
            raise Skip(f"this kernel does not take a mask here: {str(error).splitlines()[0]}") from None
        raise
    return judged(found, expected)


def no_kernel(error: RuntimeError) -> bool:
    """Whether torch refused for want of a kernel (on a GPU and on a CPU it says so in other words)."""
    return "No available kernel" in str(error) or "No viable backend" in str(error)


def kernel(attend: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> str:
    """Which of torch's attention kernels a forward pass used, by the profiler's names."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        attend(*inputs)
    names = {event.key for event in profiler.key_averages() if event.key.startswith("aten::_scaled_dot_product")}
    # The math kernel is also how a fused one is named where several are called.
    fused = sorted(name for name in names if "math" not in name)
    return (fused or sorted(names) or ["none"])[0].removeprefix("aten::_scaled_dot_product_")


def varlen_attention(device: torch.device) -> dict[str, Any]:
    """torch's varlen attention on packed documents, with grouped heads, beside fp32 with a mask."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Skip(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    if device.type != "cuda":
        raise Skip("varlen attention runs on a GPU alone")
    inputs, mask, bounds = packed_inputs(device, heads=8, key_heads=2)
    longest = int((bounds[1:] - bounds[:-1]).max())

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if query.dtype == torch.float32:
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        tokens = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return varlen(varlen_attn, *tokens, bounds=bounds, longest=longest).transpose(0, 1)[None]

    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(attend, inputs, torch.float32)
    return judged(gradients(attend, inputs, torch.bfloat16), expected)


def varlen(function: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
           bounds: torch.Tensor, longest: int, scale: float | None = None) -> torch.Tensor:  # fmt: skip
    """Causal varlen attention over (tokens, heads, width); torch 2.11 has other arguments than 2.13."""
    import inspect

    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {"scale": scale} if "scale" in parameters else {}
    if "window_size" in parameters:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = function(query, key, value, bounds, bounds, longest, longest, **options)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def loss_inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (tokens, width) and a head (vocabulary, width), both requiring gradients, and targets (tokens,)
    of which a quarter is ignored."""
    generator = torch.Generator().manual_seed(2)
    tokens, width, vocabulary = 512, 256, 4096
    hidden = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16).requires_grad_()
    head = (torch.randn(vocabulary, width, generator=generator) * 0.05).to(device, torch.bfloat16).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[::4] = -100
    return hidden, head, target.to(device)


def chunked_loss(device: torch.device) -> dict[str, Any]:
    """Cross entropy in checkpointed chunks of 128 tokens, beside fp32 in one piece: no logits of all tokens at once."""
    from torch.utils.checkpoint import checkpoint

    hidden, head, target = loss_inputs(device)

    def piece(part: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((part @ weight.T).float(), wanted, reduction="sum")

    def chunked(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parts = zip(states.split(128), target.split(128), strict=True)
        sums = [checkpoint(piece, part, weight, wanted, use_reentrant=False) for part, wanted in parts]
        return torch.stack(sums).sum() / (target != -100).sum()

    expected = gradients(lambda states, weight: piece(states, weight, target) / (target != -100).sum(),
                         (hidden, head), torch.float32)  # fmt: skip
    return named_loss(judged(gradients(chunked, (hidden, head), torch.bfloat16), expected))


def linear_cross_entropy(device: torch.device) -> dict[str, Any]:
    """torch's own fused head and loss beside fp32: in bf16 it was 3.5 % off on a CPU. Measured, not relied on."""
    function = getattr(functional, "linear_cross_entropy", None)
    if function is None:
        raise Skip(f"torch {torch.__version__} has no linear_cross_entropy")
    hidden, head, target = loss_inputs(device)
    expected = gradients(
        lambda states, weight: functional.cross_entropy(states @ weight.T, target), (hidden, head), torch.float32)
    found = gradients(
        lambda states, weight: function(states, weight, target, ignore_index=-100), (hidden, head), torch.bfloat16)
    return named_loss(judged(found, expected, limit=float("inf")))


def named_loss(values: dict[str, Any]) -> dict[str, Any]:
    """The errors under what a loss has."""
    return {"loss": values["output"], "gradient of the states": values["dq"], "gradient of the head": values["dk"]}


def cudnn_nan(device: torch.device, *, cudnn: bool) -> dict[str, Any]:
    """The gradients that are NaN with cuDNN 9.20 on Hopper (pytorch issue 196678): an explicit mask, a length of
    which 64 remain modulo 128, very negative scores. Without cuDNN they must be finite: training turns it off."""
    if device.type != "cuda" and cudnn:
        raise Skip("cuDNN's attention runs on a GPU alone")
    length = 128 + 64
    (query, key, value), mask, _ = packed_inputs(device, length=length)
    inputs = tuple(tensor.detach() for tensor in (query * 40, -query * 40 + key, value))

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*tensors, attn_mask=mask)

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if cudnn else backends):
            found = gradients(attend, inputs, torch.bfloat16)
    except RuntimeError as error:
        if cudnn and no_kernel(error):
            raise Skip(f"cuDNN does not take it here: {str(error).splitlines()[0]}") from None
        raise
    counts = {name: int((~tensor.isfinite()).sum())
              for name, tensor in zip(("output", "dq", "dk", "dv"), found, strict=True)}  # fmt: skip
    values = {f"not finite in {name}": count for name, count in counts.items()}
    if not cudnn and any(counts.values()):
        raise Wrong("not finite without cuDNN, too", values)
    return values


def falcon_kernel(device: torch.device, heads: str) -> dict[str, Any]:
    """The kernel that torch chooses for Falcon-7B's heads, with a mask as packed rows have it. With one key head and
    no hint that heads are grouped, only the math kernel takes it, which keeps scores of length x length."""
    numbers = [int(word) for word in heads.split() if word.isdigit()]
    inputs, mask, _ = packed_inputs(device, heads=numbers[0], key_heads=numbers[1], length=256, width=64)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*tensors, attn_mask=mask)

    return {"kernel": kernel(attend, inputs)}


def falcon_twin(device: torch.device) -> dict[str, Any]:
    """The kernel that the Falcon twin uses, loaded as for training and given a packed row. Wrong where it is the math
    kernel on a GPU."""
    from ftlib import recipe
    from ftlib.train.model import load_base
    from jobs.wish import CHECKOUT, RECIPES

    spec = recipe.resolve(recipe.read(RECIPES, "tiny-falcon"), "tiny-falcon", {}, None)
    model = load_base(spec, str(CHECKOUT / "models" / "tiny-falcon"), device)
    positions = torch.cat([torch.arange(32), torch.arange(32)])[None].to(device)
    values = {"kernel": kernel(lambda: model(input_ids=positions + 5, position_ids=positions, use_cache=False), ())}
    if device.type == "cuda" and "math" in values["kernel"]:
        raise Wrong("the math kernel keeps scores of length x length", values)
    return values
