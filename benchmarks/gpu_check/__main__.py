"""`make gpu-check`: all groups of checks, each in a process of its own, within ten minutes.

    make gpu-check                                in the project's virtual environment
    make gpu-check ARGS=--pack                    where there is a network: collect what a bare machine lacks
    PYTHON=python3 make gpu-check                 on that machine, without a network: with the pack in .gpu-wheels
    make gpu-check ARGS="basics --out /somewhere" one group, its rows to a folder
    make gpu-check ARGS=--dry                     the same code with tiny sizes on a CPU

Each result is a line of <out>/gpu-check-<time>.jsonl as soon as it is there; a table stands beside it as Markdown.
Exit code 1: a check of correctness failed; 69: this machine has no GPU, or lacks packages, and nothing was done.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_check import carried, pack, results, table

CHECKOUT = results.CHECKOUT
# Group: seconds that it may take, from its process's start, the last one what remains. Correctness comes before speed.
GROUPS = {"basics": 60, "twins": 180, "speed": 300, "large": 580}
# Time on a GPU machine often comes in slots of ten minutes.
WHOLE_S = 580
DRY_S = 500  # a machine may be busy; idle, all groups take a minute
GRACE_S = 10
UNAVAILABLE = 69
NEEDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "pydantic", "submitit", "yaml", "rich")


def main() -> int:
    options = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="default: all")
    options.add_argument("--pack", action="store_true", help="collect the pack; nothing is checked")
    options.add_argument("--dry", action="store_true", help="on a CPU with tiny sizes: no figure of it counts")
    options.add_argument("--all-methods", action="store_true", help="with --dry: every method, not three")
    options.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    options.add_argument("--child", nargs=3, metavar=("GROUP", "FILE", "SECONDS"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.pack:
        size_mb = pack.make()
        print(f"{len(pack.PACKAGES)} wheels, {size_mb:.1f} MB, in {pack.FOLDER}")
        return 0
    if given.child:
        group, file, seconds = given.child
        return run_group(group, Path(file), float(seconds), dry=given.dry, all_methods=given.all_methods)
    # SIGTERM, as from a scheduler, ends the group in progress too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    default = Path(tempfile.mkdtemp(prefix="gpu-check-")) if given.dry else CHECKOUT / "benchmarks" / "results"
    file = (given.out or default) / f"gpu-check-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.jsonl"
    file = file.resolve()
    with tempfile.TemporaryDirectory(prefix="gpu-check-site-") as place:
        began = time.monotonic()
        site = prepare_site(Path(place))
        if site is None and (missing := [name for name in NEEDED if not find_spec(name)]):
            print(f"gpu-check: {sys.executable} lacks {', '.join(missing)}, and {carried.fits()}", file=sys.stderr)
            return UNAVAILABLE
        environment = carried.environment(site)
        if not given.dry and not sees_gpu(environment):
            print("gpu-check: no GPU is seen here: nothing was measured. --dry tries it on a CPU", file=sys.stderr)
            return UNAVAILABLE
        flags = [flag for flag, on in (("--dry", given.dry), ("--all-methods", given.all_methods)) if on]
        for group in given.groups or GROUPS:
            budget_s = DRY_S if given.dry else GROUPS[group]
            if given.all_methods:
                budget_s = WHOLE_S
            elif not given.groups:
                budget_s = min(budget_s, WHOLE_S - (time.monotonic() - began))
            run_child(group, file, budget_s, flags, environment)
    rows = results.read(file)
    text = table.markdown(rows)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    failed = results.failures(rows)
    print(f"\n{text}\n{file}\n" + (f"FAILED: {'; '.join(failed)}" if failed else "no check failed"), flush=True)
    return 1 if failed else 0


def prepare_site(place: Path) -> Path | None:
    """The pack unpacked into `place`; None where the Python's own packages serve."""
    reason = carried.fits()
    if reason or not carried.lacking():
        return None
    names = carried.unpack(place)
    print(f"unpacked {len(names)} wheels of {pack.FOLDER}", flush=True)
    return place


def sees_gpu(environment: dict[str, str]) -> bool:
    """Asked in a process of its own: this one imports no torch."""
    command = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, env=environment, cwd=CHECKOUT, timeout=120, check=False).returncode == 0


def run_child(group: str, file: Path, budget_s: float, flags: list[str], environment: dict[str, str]) -> None:
    """A group in a process of its own, killed when it does not end in time; a row says how it ended badly. Where one
    check takes the GPU away from its process, another process makes the checks after it."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", *flags, "--child", group, str(file), str(budget_s)]
    recorder = results.Recorder(
        file=file, group=group, budget_s=budget_s, device="cpu" if "--dry" in flags else "cuda", dry="--dry" in flags)
    if budget_s < 5:
        recorder.write("the group", "not reached", reason="no time was left")
        return
    end = time.monotonic() + budget_s
    code: int | None = results.POISONED
    while code == results.POISONED and end - time.monotonic() > 5:
        command[-1] = str(end - time.monotonic())
        code = wait_for(command, environment, end + GRACE_S - time.monotonic())
    if code is None:
        recorder.write("the group", "not reached", reason=f"killed after {budget_s + GRACE_S:.0f} s")
    elif code:
        recorder.write("the group", "failed", reason=f"its process ended with {code}; what it wrote stands above")


def wait_for(command: list[str], environment: dict[str, str], timeout_s: float) -> int | None:
    """Run a command in a process group of its own; returns its exit code, None where it was killed for its time."""
    process = subprocess.Popen(command, env=environment, cwd=CHECKOUT, start_new_session=True)
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


def run_group(group: str, file: Path, budget_s: float, *, dry: bool, all_methods: bool) -> int:
    """The checks of one group, in this process."""
    recorder = results.Recorder(
        file=file, group=group, budget_s=budget_s, device="cpu" if dry else "cuda", dry=dry)
    module = importlib.import_module(f"benchmarks.gpu_check.{group}")
    if not dry:
        import torch

        recorder.by = {"device": torch.cuda.get_device_name(0), **results.versions()}
    if group == "twins":
        module.run(recorder, all_methods=all_methods or not dry)
    else:
        module.run(recorder)
    print(json.dumps({"group": group, "seconds": round(time.monotonic() - recorder.began, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
