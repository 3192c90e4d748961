"""ZeRO 2 and 3: a run that stops and goes on is the same run, at another number of processes nearly so; its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftlib import checkpoint
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed: the train extra")

import transformers  # noqa: E402

from ftlib.data.dataset import PackedRows, collate  # noqa: E402
from ftlib.errors import FtError  # noqa: E402
from ftlib.evaluate import agreement  # noqa: E402
from ftlib.export.run import export  # noqa: E402
from ftlib.export.weights import masters  # noqa: E402
from ftlib.train import zero  # noqa: E402
from tests.test_train import torch_as_it_was, trajectory, write_base, write_dataset, write_run  # noqa: E402
from tests.test_train_ranks import live  # noqa: E402
from tests.wishes import set_numerics  # noqa: E402

__all__ = ["torch_as_it_was"]
pytestmark = pytest.mark.slow
STEPS, STOP = 26, 5
# The bound that is promised after a resize, in fp32 without dropout.
NEAR = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    write_base(folder / "base")
    (folder / "data").mkdir()
    write_dataset(folder / "data")
    return folder


def wish(place: Path, name: str, stage: int, **changes: Any) -> RunDir:
    """A run folder. Two groups of parameters differ in weight decay: what is confused shows."""
    train = {"steps": STEPS, "eval_every_steps": 13, "save_every_steps": None}
    return write_run(
        place / f"{stage}-{name}" / "the-run", place / "base", place / "data", train=train, method={"kind": "full"},
        zero={"stage": stage}, optim={"weight_decay": 0.1}, export={"dtype": "bfloat16"}, **changes,
    )  # fmt: skip


def begun(place: Path, stage: int, world: int) -> tuple[RunDir, RunDir]:
    """(a whole run, one that was stopped), both of so many processes."""
    whole, stopped = wish(place, f"whole-{world}", stage), wish(place, f"stopped-{world}", stage)
    live(whole, 1, world=world)
    said = live(stopped, 1, stop_after=STOP, world=world)
    assert all(f"STOPPED {STOP} preemption" in words for words in said), said
    return whole, stopped


def gone_on(stopped: RunDir, world: int) -> RunDir:
    """A copy of the stopped run, gone on with so many processes."""
    copy = RunDir(stopped.path.parent.with_name(f"{stopped.path.parent.name}-on-{world}") / "the-run")
    shutil.copytree(stopped.path, copy.path)
    live(copy, 2, world=world)
    assert not list(copy.checkpoints.glob(".tmp-*")), "what was rewritten for a resize is deleted"
    return copy


def final(run: RunDir) -> Path:
    return checkpoint.folder_for(run.checkpoints, STEPS)


def assert_near(run: RunDir, whole: RunDir) -> None:
    ours, theirs = trajectory(run), trajectory(whole)
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    for (step, *mine), (_, *other) in zip(ours, theirs, strict=True):
        assert mine[1] == other[1] and mine[3] == other[3], f"step {step}: another learning rate, or other tokens"
        for place in (0, 4):  # loss, validation loss
            if mine[place] is not None:
                assert mine[place] == pytest.approx(other[place], abs=NEAR), f"step {step}"


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_two_ranks_stop_save_their_shards_and_go_on_alike_and_one_rank_nearly(place: Path, stage: int) -> None:
    whole, stopped = begun(place, stage, 2)
    folder = checkpoint.folder_for(stopped.checkpoints, STOP)
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    shards = {f"global_step{STOP}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
    assert shards | {"training.json", "rng_state_1.pth", "scheduler.pt"} <= set(files)
    assert not checkpoint.problems(folder, run="the-run") and not list(stopped.checkpoints.rglob(".tmp-*"))

    same = gone_on(stopped, 2)
    assert trajectory(same) == trajectory(whole)
    one, other = (masters(final(run)) for run in (same, whole))
    assert all(torch.equal(one[name].contiguous(), other[name].contiguous()) for name in other)

    assert_near(gone_on(stopped, 1), whole)

    _the_export_is_what_was_trained(same)
    _a_shard_of_another_step_is_passed_over(same)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_of_a_bfloat16_training_are_exported(place: Path, stage: int) -> None:
    """What GPUs compute in. At stage 1 DeepSpeed then takes another optimizer, with another layout of its shards."""
    run = wish(place, "bf16", stage, data={"seq_len": 48})
    set_numerics(run, compute_dtype="bfloat16")
    live(run, 1, world=2)
    losses = [row[1] for row in trajectory(run) if row[1] is not None]
    assert losses[-1] < losses[0]
    _the_export_is_what_was_trained(run)


def _the_export_is_what_was_trained(run: RunDir) -> None:
    """The validation loss of the files that plain transformers loads is the one that training ended with."""
    words = export(run, 1, StopFlag())
    found = json.loads((run.export / "equality.json").read_text())
    assert found["passed"] and found["tensors"] == 20 and "20 tensors are the trained ones in bfloat16" in words
    model = transformers.AutoModelForCausalLM.from_pretrained(run.export / "merged")
    assert model.dtype is torch.bfloat16 and model.config.use_cache and model.generation_config.eos_token_id == 2
    rows = PackedRows(Path(run.prepared()["dataset"]) / "validation")
    inputs = collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        loss = float(model.float()(**inputs, use_cache=False).loss)
    assert loss == pytest.approx(trajectory(run)[-1][-1], rel=2e-3)
    _evaluation_requires_the_validation_loss(run, model)


def _evaluation_requires_the_validation_loss(run: RunDir, model: Any) -> None:
    """The loss that training measured at the checkpoint, of all rows or of the first; other weights are refused."""
    (run.path / "evaluation").mkdir()
    file = run.path / "evaluation" / "validation-loss.json"
    for rows in (512, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agreement, "ROWS", rows)
            agreement.require_validation_loss(run, model, StopFlag())
        found = json.loads(file.read_text())
        assert found["expected"] == trajectory(run)[-1][-1]
        assert found["rows"] == min(rows, 36) and found["of_rows"] == 36
        assert found["allowed"] == pytest.approx(0.005 * found["expected"]) or rows == 8
        file.unlink()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(FtError, match="the exported weights are not the trained ones: their validation loss is"):
        agreement.require_validation_loss(run, model, StopFlag())
    assert not file.exists()


def _a_shard_of_another_step_is_passed_over(run: RunDir) -> None:
    """A shard that is missing, or another step's, makes a checkpoint damaged; nothing is joined of what is left."""
    folder = final(run)
    shard = folder / f"global_step{STEPS}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    before = next(path for path in checkpoint.committed(run.checkpoints) if path != folder)
    shutil.copyfile(next(before.glob("global_step*/zero_pp_rank_1_*optim*")), shard)
    assert "does not match its checksum" in checkpoint.problems(folder, run="the-run")[0]
    shard.unlink()
    assert checkpoint.problems(folder, run="the-run")[0].endswith("is missing")
    with pytest.raises(FtError, match="cannot be joined: Expected 2"):
        masters(folder)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_one_rank_stops_and_two_go_on_nearly_alike(place: Path, stage: int) -> None:
    whole, stopped = begun(place, stage, 1)
    assert_near(gone_on(stopped, 2), whole)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.nightly)])
def test_ddp_goes_on_at_another_number_of_processes(place: Path, before: int, after: int) -> None:
    whole, stopped = begun(place, 0, before)
    assert_near(gone_on(stopped, after), whole)


def test_offloaded_state_is_the_same_state(place: Path) -> None:
    """On a CPU nothing moves, but the optimizer's path is the offloaded one."""
    plain, offloaded = (
        wish(place, "plain", 3),
        wish(
            place,
            "offload",
            3,
        ),
    )
    values = json.loads(offloaded.spec_file.read_text())
    offloaded.spec_file.write_text(json.dumps({**values, "zero": {"stage": 3, "offload": "cpu"}}))
    live(plain, 1, world=1)
    live(offloaded, 1, world=1)
    assert_near(offloaded, plain)


def test_mend_gives_each_state_its_own_step_and_each_group_its_decay() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "weight_decay": 0.5} for w in weights])
    step = torch.tensor(3.0)
    for weight in weights:
        optimizer.state[weight] = {"step": step, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        weight.grad = torch.ones(2)
    zero.mend(optimizer, [0.1, 0.0])
    optimizer.step()
    assert [float(optimizer.state[w]["step"]) for w in weights] == [4.0, 4.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
