"""Invalid input that a single rank finds ends the whole job with 64, whatever the other ranks see of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import atomic
from ftlib.rundir import RunDir
from ftlib.runs import outcome
from ftlib.runs.outcome import Outcome
from jobs import stage
from tests.cluster import Slurm
from tests.processes import started
from tests.sweeps import checkout
from tests.test_chain import finished, log
from tests.wishes import jobs, run_names, set_numerics

__all__ = ["checkout"]
FOUND = Outcome("train", 2, 64, "model.name: no such file (rank 1 on n2)")
BAD_GPU = Outcome("train", 2, 76, "train: node n2 shows 1 of its 2 GPUs (rank 1 on n2)")


@pytest.mark.parametrize("found", [FOUND, BAD_GPU])
@pytest.mark.parametrize(
    "later",
    [
        Outcome("train", 2, 1, "RuntimeError: Connection reset by peer"),
        Outcome("train", 2, 75, "interrupted (preemption), saved at step 3"),
        Outcome("train", 2, 0, "trained 3 steps"),
    ],
)
def test_what_rank_0_sees_later_does_not_replace_what_another_rank_found(
    tmp_path: Path, found: Outcome, later: Outcome
) -> None:
    assert outcome.create(tmp_path, found)
    assert outcome.settle(tmp_path, later) == found
    assert not outcome.create(tmp_path, later)
    assert outcome.read(tmp_path) == [found]
    assert [path.name for path in tmp_path.iterdir()] == ["train-2"], "nothing temporary is left"


def test_the_first_cause_stands_and_rank_0_may_correct_its_own(tmp_path: Path) -> None:
    interrupted = Outcome("train", 2, 75, "interrupted (preemption), saved at step 3")
    assert outcome.settle(tmp_path, interrupted) == interrupted
    assert not outcome.create(tmp_path, FOUND), "the job was ending already"
    hung = Outcome("train", 2, 75, "interrupted (idle GPU); the process hung and was ended")
    assert outcome.settle(tmp_path, hung) == hung and outcome.read(tmp_path) == [hung]
    other = Outcome("train", 3, 0, "trained 3 steps")
    assert outcome.settle(tmp_path, other) == other, "another attempt is none of its business"


def test_a_file_is_created_once_also_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert atomic.create_text(tmp_path / "a", "1") and not atomic.create_text(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("nodes", "address"), [("n[7-8]", "n7"), ("n7", "127.0.0.1")])
def test_ranks_meet_on_the_first_node_and_on_a_single_one_where_nobody_else_reaches_them(
    nodes: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are put back
    slurm_variables = {
        "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": nodes, "SUBMITIT_EXECUTOR": "slurm",
    }  # fmt: skip
    for name, value in slurm_variables.items():
        monkeypatch.setenv(name, value)
    assert stage._set_rank() == 1
    assert os.environ["MASTER_ADDR"] == address and os.environ["WORLD_SIZE"] == "2"


RANK = """
import os, sys
from pathlib import Path
from ftlib.errors import InputError
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.train import ranks, run
from jobs import stage

load_base = run.load_base

def only_here_unreadable(*args, **options):
    if ranks.rank() == 1:
        raise InputError("model.name: weights.bin: Permission denied")
    return load_base(*args, **options)

run.load_base = only_here_unreadable
stop = StopFlag().install()
os._exit(stage._live(RunDir(Path(sys.argv[1])), "train", 1, ranks.rank(), stop))
"""


def ended(run: RunDir, *, kill_rank_0: bool) -> list[tuple[int, str]]:
    """Exit code and output of two ranks; as srun --kill-on-bad-exit does, rank 0 may be sent SIGTERM."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randint(20_000, 30_000))}
    common |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    both = [
        started(
            [sys.executable, "-c", RANK, str(run.path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"},
        )
        for rank in range(2)
    ]  # fmt: skip
    with both[0] as first, both[1] as second:
        ranks = first, second
        said = [ranks[1].communicate(timeout=120)[0]]
        if kill_rank_0:
            ranks[0].send_signal(signal.SIGTERM)
        said.insert(0, ranks[0].communicate(timeout=120)[0])
    return [(process.returncode, words) for process, words in zip(ranks, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kill_rank_0", [False, True])
def test_a_file_that_only_rank_1_cannot_read_is_the_outcome_of_both(tmp_path: Path, kill_rank_0: bool) -> None:
    pytest.importorskip("torch", reason="training needs torch: the train extra")
    from tests.test_train import write_base, write_dataset, write_run

    write_base(tmp_path / "base")
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data")
    run = write_run(tmp_path / "the-run", tmp_path / "base", tmp_path / "data", train={"steps": 2})
    plan = run.plan()
    plan["stages"]["train"] |= {"gpus_per_node": 0, "nodes": 2, "tasks_per_node": 1}
    run.plan_file.write_text(json.dumps(plan))
    set_numerics(run, nodes=2)
    run.lives.mkdir(exist_ok=True)
    (first, first_said), (second, second_said) = ended(run, kill_rank_0=kill_rank_0)
    assert (first, second) == (64, 64), first_said + second_said
    (found,) = outcome.read(run.outcomes)
    assert found.code == 64 and found.message == "model.name: weights.bin: Permission denied (rank 1 on n1)"
    assert "Traceback" not in second_said


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_does_not_start_again_what_another_rank_found_wrong(checkout: Path, slurm: Slurm) -> None:
    """Two nodes; a file cannot be read on the second one. srun then ends rank 0, which knows nothing of it."""
    pytest.importorskip("torch", reason="the training packages are not installed (make setup)")
    code = checkout / "ftlib" / "train" / "run.py"
    text = code.read_text()
    marker = '    times.done("rendezvous_s")\n'
    assert marker in text
    broken = '    if ranks.rank() == 1:\n        raise InputError("model.name: weights.bin: Permission denied")\n'
    code.write_text(text.replace(marker, marker + broken))
    try:
        settings = "train.steps=4 data.pairs=200 evaluate.pairs=4 train.micro_batch=1 "
        settings += f"cluster.scheduler.slurm_conf={slurm.env['SLURM_CONF']}"
        words = ["submit", "--cluster", "local-slurm", "--nodes", "2", "--set", settings]
        done = jobs(*words, checkout=checkout)
    finally:
        code.write_text(text)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = run_names(checkout)
    run = RunDir(checkout / "runs" / name)
    found = finished(checkout, run)
    assert found["state"] == "failed", log(run)
    (end,) = outcome.read(run.outcomes, "train")
    assert end.code == 64 and end.message.startswith("model.name: weights.bin: Permission denied (rank 1 on "), end
    assert [path.name for path in run.lives.glob("train-*")] == ["train-1"], "it was not started again"
