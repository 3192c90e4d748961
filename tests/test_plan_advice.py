"""What `make plan` says: a smaller GPU, too short a run, rows too long, a base that cannot be trained, cost."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from ftlib.errors import InputError
from ftlib.plan import amount, fits, gpus, memory, plan, shapes
from ftlib.plan.plan import RunPlan
from ftlib.profile import Gpu
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved
from ftlib.spec import RunSpec
from jobs import smoke
from tests.wishes import CHECKOUT, LLAMA_7B, jobs, planned, site, spec

B200 = {"account": "lab"}


def noted(plan: RunPlan, words: str) -> bool:
    return any(words in note for note in plan.notes)


# -- host memory -------------------------------------------------------------------------------------------------------


def test_a_gpu_job_asks_for_half_of_its_gpus_share_of_the_node() -> None:
    wish = spec("llama2-7b", resources__gpus_per_node=8, train__global_batch=16)
    found = planned(wish, site("hipergator", **B200)).stages
    assert found["train"].mem_gib == 1000 and found["evaluate"].mem_gib == 125
    assert found["prepare"].mem_gib == 4  # a CPU job asks for what it needs


def test_never_less_host_memory_than_the_formula_says_and_never_more_than_the_node() -> None:
    whole = spec("llama2-7b", method__kind="full", zero__stage=3, zero__offload="cpu", resources__gpus_per_node=8)
    needed = planned(whole, site("a100")).stages["train"].mem_gib
    tight = site("a100")
    sides = tuple(p.model_copy(update={"mem_gib_per_node": needed + 0.5}) for p in tight.partitions)
    found = planned(whole, tight.model_copy(update={"partitions": sides})).stages["train"]
    assert needed >= found.mem_gib > 0.5 * (needed + 0.5) and found.mem_gib <= needed + 0.5


def test_simulated_gpus_have_no_share() -> None:
    assert planned(spec(), site("local-slurm")).stages["train"].mem_gib < 15


# -- which GPU ---------------------------------------------------------------------------------------------------------


def test_a_smaller_gpu_of_the_site_is_named() -> None:
    assert noted(planned(spec("llama2-7b"), site("hipergator", **B200)), 'l4 with 22.5 GiB, SET="cluster.gpu_partition')
    large = planned(spec("llama2-7b", method__kind="full", optim__name="adamw_torch"), site("hipergator", **B200))
    assert not noted(large, "a smaller GPU")  # 7B in fp32 with its moments: no other holds it
    most = planned(spec("llama2-7b"), site("hipergator", gpu_partition="hpg-turin", **B200))
    assert not noted(most, "a smaller GPU")
    # Three L4s are in a node: no place for eight.
    eight = planned(spec("llama2-7b", resources__gpus_per_node=8), site("hipergator", **B200))
    assert noted(eight, "rtx6000 with 95 GiB")


@pytest.mark.parametrize(
    ("name", "capability"), [("v100", 7.0), ("Tesla V100-SXM2-32GB", 7.0), ("P100", 6.0), ("a100", None), ("L4", None)]
)
def test_old_gpus_are_known_by_their_name(name: str, capability: float | None) -> None:
    assert gpus.capability(Gpu(type=name, memory_gib=32)) == capability


def test_a_gpu_that_the_locked_packages_do_not_know_is_refused_before_anything_is_queued() -> None:
    old = site("a100")
    v100 = old.partitions[0].model_copy(update={"name": "volta", "gpu": Gpu(type="v100", memory_gib=32)})
    old = old.model_copy(update={"gpu_partition": "volta", "partitions": (v100, *old.partitions)})
    with pytest.raises(InputError) as error:
        planned(spec("llama2-7b"), old)
    (message,) = error.value.messages
    assert "capability 7; torch's build for CUDA 13 needs compute capability 7.5" in message
    assert "driver 580 or newer; choose one of gpu" in message


# -- the run itself ----------------------------------------------------------------------------------------------------


def test_a_run_of_one_step_or_without_warm_up_is_told() -> None:
    a100 = site("a100")
    assert noted(planned(spec("llama2-7b", train__steps=1, train__epochs=None), a100), "one optimizer step")
    assert noted(planned(spec("llama2-7b", train__steps=10, train__epochs=None), a100), "0.03 of 10 steps is no step")
    only = spec("llama2-7b", train__steps=10, train__epochs=None, optim__warmup_share=0.99)
    assert noted(planned(only, a100), "all 10 steps are warm-up")
    assert not noted(planned(spec("llama2-7b"), a100), "warm")


def test_rows_beyond_the_models_positions_are_told() -> None:
    assert noted(planned(spec("llama2-7b", data__seq_len=8192), site("a100")), "than the 4,096 positions")
    assert not noted(planned(spec("llama2-7b", data__seq_len=4096), site("a100")), "positions")


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        (None, 4096),
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 4096),
    ],
)
def test_scaled_rotary_positions_reach_further(scaling: dict[str, object] | None, reach: int) -> None:
    config = {**shapes.KNOWN["meta-llama/Llama-2-7b-hf"], "rope_scaling": scaling}
    assert shapes.from_config(config, "llama").positions == reach


def test_a_base_that_is_quantized_already_is_refused_with_the_way_out() -> None:
    config = {**shapes.KNOWN["meta-llama/Llama-2-7b-hf"], "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (message,) = fits.problems(spec("llama2-7b"), shapes.from_config(config, "llama"))
    assert "is quantized already (gptq)" in message and "Name the 16-bit model" in message


def test_a_merge_that_no_node_holds_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed_gib(shape: shapes.ModelShape, spec: RunSpec, **_: object) -> float:
        return 4000 if spec.export.merged else 10

    monkeypatch.setattr(memory, "export_host_gib", needed_gib)
    with pytest.raises(InputError, match=r"export needs 4000 GiB .* Try export\.merged=false"):
        planned(spec("llama2-7b"), site("a100"))
    planned(spec("llama2-7b", export__merged=False), site("a100"))


# -- how much data -----------------------------------------------------------------------------------------------------


def unmeasured(**changes: object) -> RunSpec:
    return spec("llama2-7b", data__hub="someone/unmeasured", **changes)


def test_the_cost_of_an_unmeasured_dataset_is_unknown() -> None:
    found = planned(unmeasured(), site("a100"))
    assert (found.steps, found.gpu_hours, found.stages["train"].estimate_min) == (None, None, None)
    assert noted(found, "nobody has measured someone/unmeasured") and not noted(found, "an estimate until")
    assert found.stages["prepare"].time_min == 240
    known = planned(unmeasured(train__steps=100, train__epochs=None), site("a100"))
    assert known.steps == 100 and known.gpu_hours


def test_a_limit_bounds_an_unmeasured_dataset() -> None:
    found = planned(unmeasured(data__limit=1000), site("a100"))
    assert found.steps == planned(spec("llama2-7b", data__pairs=1000), site("a100")).steps


def test_a_plan_of_unknown_length_is_printed(tmp_path: Path) -> None:
    done = jobs("plan", "--model", "llama2-7b", "--cluster", "a100", "--set", "data.hub=someone/unmeasured")
    assert done.returncode == 0, done.stderr
    assert "an unknown number of steps of 16 rows" in done.stdout and "cost: unknown" in done.stdout


def test_examples_are_rows_where_they_are_not_packed() -> None:
    packed = spec("llama2-7b", data__pairs=1600, train__epochs=1)
    alone = spec("llama2-7b", data__pairs=1600, train__epochs=1, method__kind="two-stage")
    found = {name: planned(wish, site("a100")) for name, wish in (("packed", packed), ("alone", alone))}
    assert found["alone"].steps == 1600 / 16
    assert found["alone"].steps > 3 * (found["packed"].steps or 0)
    # Twice the rows' tokens would be four times the time; an example is as long as itself, not as a row.
    times = {name: one.stages["train"].estimate_min or 0 for name, one in found.items()}
    assert times["alone"] < 2 * times["packed"]
    assert found["alone"].row_tokens == amount.TOKENS_PER_PAIR[alone.data.template] + alone.method.prompt_tokens


def test_what_the_lock_needs_of_a_driver_is_what_we_say() -> None:
    """torch 2.12 and later on PyPI are built for CUDA 13; 2.10 and earlier for 12.8."""
    version = re.search(r"^torch==2\.(\d+)", (CHECKOUT / "env" / "torch.txt").read_text(), re.M)
    assert version and int(version[1]) >= 12 and gpus.LOCKED_CUDA == 13


def test_the_shape_of_every_model_is_still_found() -> None:
    assert dataclasses.replace(LLAMA_7B, positions=None).params == LLAMA_7B.params
    done = jobs("plan", "--json", "--model", "tiny", "--cluster", "local")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"]
    assert plan.HOST_SHARE <= 1


def test_ten_steps_tell_their_pace_where_nobody_knows_how_many_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = planned(unmeasured(), site("a100")).model_dump(mode="json")
    run = RunDir(tmp_path)
    run.metrics_file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "loss": 1.0, "tokens_per_s": 4000.0, "seconds": 4.1, "life": 1} for step in range(1, 11)]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.record(CheckpointSaved(stage="train", attempt=1, step=10, seconds=0.5), writer="train-1")
    smoke._measured(run, whole, peak=9.0)
    out = capsys.readouterr().out
    assert "A step takes 4.10 s; how many there are is unknown" in out and "whole training" not in out
    assert json.loads((tmp_path / "smoke.json").read_text())["gpu_hours"] is None
