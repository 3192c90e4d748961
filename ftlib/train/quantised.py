"""A large base is quantised once: the 4-bit weights are kept in the cache, verified, for the next life.
A 7B in bf16 is 13 GB to read and quantise, and 4 GB to read again; below PAYS_FROM_BYTES nothing is gained."""

import contextlib
import hashlib
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ftlib import atomic, sealing
from ftlib.spec import MethodSpec

PAYS_FROM_BYTES = 1 << 30
MANIFEST = "manifest.json"
FORMAT = 1
EDGE_BYTES = 1 << 20
STALE_S = 24 * 3600
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def place(
    cache: Path, model_path: str, revision: str | None, method: MethodSpec, dtype: torch.dtype, device: torch.device
) -> Path | None:
    """Where the 4-bit weights of this model are kept; None where keeping them does not pay."""
    config = Path(cached_file(model_path, "config.json", revision=revision))
    files = sorted(path for pattern in WEIGHTS for path in config.parent.glob(pattern))
    if sum(path.stat().st_size for path in files) < PAYS_FROM_BYTES:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    wish = {
        "format": FORMAT, "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "weights": {path.name: _identity(path) for path in files},
        "quant": [method.quant_type, method.double_quant, str(dtype)],
        # Kernels of another version or device may round otherwise.
        "by": [version("torch"), version("transformers"), version("bitsandbytes"), name],
    }
    return cache / "quantised" / hashlib.sha256(json.dumps(wish, sort_keys=True).encode()).hexdigest()[:32]


def _identity(path: Path) -> list[Any]:
    """What tells a file of weights from another without reading all of it: the hub names its files by content."""
    real = path.resolve()
    if len(real.name) == 64 and set(real.name) <= set("0123456789abcdef"):
        return [real.name]
    state = real.stat()
    with real.open("rb") as file:
        edges = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(0, state.st_size - EDGE_BYTES))
        edges.update(file.read(EDGE_BYTES))
    return [state.st_size, state.st_mtime_ns, edges.hexdigest()]


def sound(folder: Path, *, remove: bool) -> bool:
    """Whether the kept weights are there and every byte verifies; `remove`: damaged ones are said and deleted."""
    if not folder.exists():
        return False
    try:
        wrong = sealing.damage(folder, sealing.manifest(folder / MANIFEST, FORMAT)["files"], MANIFEST)
    except (OSError, ValueError) as error:
        wrong = [f"{MANIFEST}: {error}"]
    if wrong and remove:
        print(f"the kept 4-bit weights in {folder} are damaged and made anew: {'; '.join(wrong[:3])}", flush=True)
        with contextlib.suppress(OSError):
            atomic.discard_folder(folder)
    return not wrong


def keep(model: PreTrainedModel, folder: Path) -> None:
    """Write the 4-bit weights for the next life. A failure is said and stops nothing."""
    began = time.perf_counter()
    temporary = atomic.temporary_beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep_temporaries(folder.parent, still_s=STALE_S)
        atomic.require_space(folder.parent, int(1.1 * model.get_memory_footprint()), "the 4-bit weights")
        temporary.mkdir()
        model.save_pretrained(temporary)
        listed = sealing.seal(temporary)
        atomic.write_json(temporary / MANIFEST, {"format": FORMAT, "files": listed})
        atomic.commit_folder(temporary, folder)
        size, seconds = sum(file["bytes"] for file in listed.values()), time.perf_counter() - began
        print(f"4-bit weights kept for the next life: {size / 2**30:.2f} GiB, {seconds:.1f} s", flush=True)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        words = " ".join(str(error).split())[:200]
        print(f"the 4-bit weights could not be kept in {folder.parent}: {words}", flush=True)
