"""Which GPUs and drivers the locked packages run on. Pure; what a profile says is enough."""

from ftlib.profile import Gpu

# Older GPUs compute no bf16, and neither torch's nor bitsandbytes' builds for CUDA 13 have machine code for them.
LOWEST_CAPABILITY = 7.5
# From here on GPUs have units for bf16 (Ampere).
BF16_CAPABILITY = 8.0
# The oldest driver for programs of a CUDA major version (NVIDIA's guide to CUDA's minor version compatibility).
OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}
# CUDA that the locked torch is built for.
LOCKED_CUDA = 13

# NVIDIA's table of compute capabilities: the older GPUs that clusters still have. A profile may say more.
OLDER = {
    "k20": 3.5, "k40": 3.5, "k80": 3.7, "m40": 5.2, "m60": 5.2, "gtx1080": 6.1, "gtx1080ti": 6.1, "p4": 6.1,
    "p40": 6.1, "p100": 6.0, "titanv": 7.0, "v100": 7.0, "v100s": 7.0,
}  # fmt: skip
# A second choice of torch for drivers of CUDA 12. With the other locks it was tried on a CPU alone: training and resume
# of every method. It is no help for a V100: that computes no bf16, which training does.
FOR_CUDA_12 = (
    "with drivers of CUDA 12 (525 or newer): cp env/torch-cuda12.txt env/torch.txt, then make env installs torch's "
    "build for CUDA 12.8"
)
NEEDED = (
    f"torch's build for CUDA {LOCKED_CUDA} needs compute capability {LOWEST_CAPABILITY} (T4) or newer and driver "
    f"{OLDEST_DRIVER[LOCKED_CUDA]} or newer"
)


def capability(gpu: Gpu) -> float | None:
    """Its compute capability, from the profile or from its name; None where neither tells."""
    if gpu.capability is not None:
        return gpu.capability
    for name in (gpu.type, gpu.gres):
        short = "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("tesla")
        # "v100-32gb" and "V100_SXM2" are V100s, too.
        for known in sorted(OLDER, key=len, reverse=True):
            if short.startswith(known) and not short[len(known) :][:1].isdigit():
                return OLDER[known]
    return None


def too_old(gpu: Gpu) -> str | None:
    """Why the locked packages cannot use it; None where they can, or where nothing is known."""
    found = capability(gpu)
    if found is None or found >= LOWEST_CAPABILITY:
        return None
    return f"{gpu.type} has compute capability {found:g}; {NEEDED}"
