"""Training in two processes: they stop at one step, save together, and go on to the same end."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ftlib import checkpoint
from ftlib.rundir import RunDir

pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from tests.processes import started
from tests.test_train import adapter_sha, trajectory, write_base, write_dataset, write_run
from tests.wishes import set_numerics

pytestmark = pytest.mark.slow

RANK = """
import os, sys
from pathlib import Path
from ftlib.errors import Interrupted
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.train import ranks, trainer
from ftlib.train.run import train

folder, life, stop_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
stop, record = StopFlag(), trainer.FineTuner._record

def watched(self, *args):
    record(self, *args)
    if self.state.global_step == stop_after and ranks.rank() == ranks.world_size() - 1:  # one rank alone is warned
        stop.cause = "preemption"

trainer.FineTuner._record = watched
if os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL":
    from torch import distributed
    # DDP's own log of its settings: with it torch 2.13.0 crashes (SIGSEGV) under DETAIL, in the smallest program.
    distributed.Logger.set_construction_data_and_log = lambda *_: None
try:
    train(RunDir(folder), life, stop)
except Interrupted as interrupted:
    print("STOPPED", interrupted.step, interrupted.cause)
sys.stdout.flush()
os._exit(0)  # as jobs.stage ends: an interpreter's exit with a library's threads aborts now and then
"""


def live(run: RunDir, life: int, stop_after: int = 0, world: int = 2, **variables: str) -> list[str]:
    """One life of so many processes, the global batch of 4 shared out; what each printed."""
    set_numerics(run, nodes=world, micro_batch=1)
    port = str(random.randint(20_000, 30_000))
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": str(Path(__file__).parents[1]), "DS_ACCELERATOR": "cpu", **variables}
    command = [sys.executable, "-c", RANK, str(run.path), str(life), str(stop_after)]
    processes = []
    with ExitStack() as running:
        for rank in range(world):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            one = started(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            processes.append(running.enter_context(one))
        said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, said
    return said


def test_two_ranks_stop_and_go_on_as_one(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data")
    train = {"steps": 12, "eval_every_steps": 4, "save_every_steps": None}
    runs = [
        write_run(tmp_path / name / "the-run", tmp_path / "base", tmp_path / "data", train=train)
        for name in ("interrupted", "whole")
    ]
    # It compares every collective's kind and shape over all ranks, and raises where one rank makes another call.
    checked = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    said = live(runs[0], 1, stop_after=5, **checked)
    assert all("STOPPED 5 preemption" in words for words in said)
    folder = checkpoint.folder_for(runs[0].checkpoints, 5)
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "adapter_model.safetensors"} <= set(files)
    assert checkpoint.problems(folder, run="the-run") == []
    assert not list(runs[0].checkpoints.rglob(".tmp-*")), "each rank's share has moved into its place"
    live(runs[0], 2, **checked)
    live(runs[1], 1)
    assert trajectory(runs[0]) == trajectory(runs[1])
    assert adapter_sha(runs[0], 12) == adapter_sha(runs[1], 12)
