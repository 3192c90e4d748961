"""What only a GPU can show: `make gpu-check`, offline, a group a call (ARGS="llama2-7b"), each within 8 minutes.

For each large recipe a model of its true shape with random weights is made on the GPU: twenty steps, a save, and a
resume from half-way that must end in the same bits. Written to benchmarks/results/<gpu>.json; what could not be
measured stays null. Without bitsandbytes the 16-bit base is trained in place of the 4-bit one, and the row says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.lives import CHECKOUT, sha
from benchmarks.methods import make_run, process

STEPS, HALF = 20, 10
# Recipe: the twin whose tokenizer serves, and what the recipe's data is offline.
LARGE = {
    "llama2-7b": ("tiny-llama3", ""), "codellama-13b": ("tiny-llama3", "data.pairs=4000"),
    "falcon-7b": ("tiny-falcon", "data.hub=null data.path=samples/oasst_trees.jsonl data.held_out=0.2")}
# Published peaks in bf16 without sparsity, TFLOP/s (the makers' data sheets).
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "L4": 121}
LIMITS = {"codellama-13b": {"limit_gib": 32, "litgpt_gib": 22.6}}
EMPTY = ("method", "steps", "tokens_per_s", "flop_share", "peak_gib", "planned_gib", "resume_equal", "error")


def tests() -> dict[str, Any]:
    """The test suite's GPU part, in a process of its own."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, timeout=480, check=False)
    lines = [line for line in done.stdout.splitlines() if " in " in line and ("passed" in line or "selected" in line)]
    return {"rc": done.returncode, "words": lines[-1] if lines else done.stdout[-300:]}


def write_model(recipe: str, folder: Path, twin: str) -> None:
    """A model of the recipe's true shape, random weights made on the GPU, with a twin's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftlib import recipe as recipes
    from ftlib.plan.shapes import KNOWN
    from jobs.wish import RECIPES

    config = dict(KNOWN[recipes.load(RECIPES, recipe, {}).model.name])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    for path in (CHECKOUT / "models" / twin).glob("tokenizer*"):
        shutil.copy(path, folder)


def large(recipe: str, gpu: str, root: Path) -> dict[str, Any]:
    """Steps, speed, memory and the resume of one recipe."""
    from ftlib import checkpoint
    from ftlib.metrics import read_metrics
    from ftlib.plan import shapes, throughput

    twin, data = LARGE[recipe]
    write_model(recipe, root / "model", twin)
    said = f"model.name={root / 'model'} train.steps={STEPS} train.keep_every_steps={HALF} train.deterministic=true "
    said += f"tracking.mode=disabled {data}"
    if not find_spec("bitsandbytes"):
        said += " method.kind=lora method.base_bits=16 optim.name=adamw_torch"
    run = make_run(root / "whole" / "a-run", root / "cache", recipe, said)
    _, peak = process(run.path, 1, None)
    # The same run as it was half-way.
    shutil.copytree(run.path, root / "halved" / "a-run")
    halved = type(run)(root / "halved" / "a-run")
    shutil.rmtree(checkpoint.folder_for(halved.checkpoints, STEPS))
    process(halved.path, 2, None)

    speeds = [row["tokens_per_s"] for row in read_metrics(run.metrics_file) if "loss" in row][3:]
    speed = statistics.median(speeds)
    shape = shapes.from_config(json.loads((root / "model" / "config.json").read_text()), recipe)
    tflops = next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)
    used = speed * throughput.flops_per_token(shape, run.spec()) / 1e12
    spec = run.spec()
    equal = len({sha(checkpoint.folder_for(one.checkpoints, STEPS)) for one in (run, halved)}) == 1
    return {
        "method": f"{spec.method.kind}, {spec.method.bits} bits", "steps": STEPS, "tokens_per_s": round(speed, 1),
        "flop_share": round(used / tflops, 4) if tflops else None, "peak_gib": round(peak / 1024, 2),
        "planned_gib": run.plan()["gpu_needed_gib"], "resume_equal": equal}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("groups", nargs="*", choices=["tests", *LARGE, []], help="default: all")
    options.add_argument("--folder", type=Path, help="where models are made (27 GB); default: the temporary folder")
    said = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    if not torch.cuda.is_available():
        print("no GPU is seen here: nothing was measured, the cells stay blank")
        return
    gpu = torch.cuda.get_device_name(0)
    results = CHECKOUT / "benchmarks" / "results" / f"{gpu.replace(' ', '-')}.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    found["by"] = {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__,
                   "python": sys.version.split()[0], "bitsandbytes": bool(find_spec("bitsandbytes"))}  # fmt: skip
    results.parent.mkdir(exist_ok=True)
    for group in said.groups or ["tests", *LARGE]:
        if group == "tests":
            found[group] = tests()
        else:
            found[group] = dict.fromkeys(EMPTY) | LIMITS.get(group, {})
            with tempfile.TemporaryDirectory(dir=said.folder) as root:
                try:
                    found[group] |= large(group, gpu, Path(root))
                except (Exception, SystemExit) as error:  # one recipe's failure leaves the others' cells
                    found[group]["error"] = str(error)[-2000:]
        print(group, json.dumps(found[group], indent=1), flush=True)
        results.write_text(json.dumps(found, indent=1) + "\n")
    failed = [group for group in (said.groups or ["tests", *LARGE]) if not _good(found[group])]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _good(row: dict[str, Any]) -> bool:
    return row["rc"] in (0, 5) if "rc" in row else bool(row["resume_equal"])  # 5: no test is marked


if __name__ == "__main__":
    main()
