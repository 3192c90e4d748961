"""Before anything is queued: does it fit, how is the batch cut, what does it ask for."""

from __future__ import annotations

import pytest

from ftlib.errors import InputError
from ftlib.plan import memory, throughput
from ftlib.plan.plan import RunPlan
from ftlib.rundir import STAGES
from ftlib.slurm import batch
from tests.wishes import LLAMA_7B, planned, site, spec


def test_llama_7b_weights_as_published() -> None:
    # 3.34 GB in NF4 with double quantisation, and 0.52 GB of bf16 embedding and head.
    linear = LLAMA_7B.linear_params * memory.NF4_BYTES[True]
    assert linear / 1e9 == pytest.approx(3.34, abs=0.01)
    assert 2 * LLAMA_7B.embedding_params / 1e9 == pytest.approx(0.52, abs=0.01)
    assert LLAMA_7B.matmul_params / 1e9 == pytest.approx(6.61, abs=0.01)


@pytest.mark.parametrize(("checkpointing", "published"), [(False, 11_127), (True, 7_466)])
def test_flop_floor_of_an_a100_as_published(checkpointing: bool, published: int) -> None:
    wish = spec("llama2-7b", data__seq_len=2048, train__gradient_checkpointing=checkpointing)
    assert 312e12 / throughput.flops_per_token(LLAMA_7B, wish) == pytest.approx(published, rel=0.005)


def test_llama_7b_fits_an_a100_and_cpu_stages_hold_no_gpu() -> None:
    plan = planned(spec("llama2-7b"), site("a100"))
    assert {name for name, stage in plan.stages.items() if stage.device == "cuda"} == {"train", "export", "evaluate"}
    assert plan.gpu_needed_gib and plan.gpu_memory_gib
    assert plan.gpu_needed_gib < plan.gpu_memory_gib
    assert {name: stage.gpus_per_node for name, stage in plan.stages.items()} == {
        "prepare": 0,
        "train": 1,
        "export": 1,
        "evaluate": 1,
    }
    assert plan.gpu_hours and plan.gpu_hours > 0


def test_export_and_evaluation_share_one_job_where_both_need_a_gpu() -> None:
    two = (("prepare",), ("train",), ("export", "evaluate"))
    one_each = tuple((stage,) for stage in STAGES)
    assert planned(spec("llama2-7b"), site("a100")).jobs == planned(spec(), site("local-slurm")).jobs == two
    # Without a GPU there is none to share; ZeRO's shards are joined on a CPU, which must hold no GPU meanwhile.
    assert planned(spec(), site("local")).jobs == one_each
    whole = spec("llama2-7b", method__kind="full", zero__stage=3, train__global_batch=16, resources__gpus_per_node=8)
    assert planned(whole, site("a100")).jobs == one_each


def test_a_shared_job_asks_for_the_most_of_each_resource_and_all_of_the_time() -> None:
    profile = site("a100")
    plan = planned(spec("llama2-7b"), profile)
    stages = {name: dict(plan.stages[name]) for name in STAGES}
    stages["export"] |= {"mem_gib": 35, "time_min": 30, "estimate_min": 5.0, "cpus_per_task": 4, "warning_s": 130}
    stages["evaluate"] |= {"mem_gib": 19, "time_min": 26, "estimate_min": 3.0, "gpus_per_node": 2, "warning_s": 120}
    plan = RunPlan.model_validate({**dict(plan), "stages": stages})
    asked = batch.request(profile, plan, ("export", "evaluate"))
    assert (asked.mem_gib, asked.time_min, asked.estimate_min, asked.gpus_per_node) == (35, 56, 8.0, 2)
    assert (asked.cpus_per_task, asked.warning_s) == (8, 130)
    # Alone, each asks for its own; together, never for more time than the partition gives.
    assert batch.request(profile, plan, ("export",)) == plan.stages["export"]
    stages["evaluate"]["time_min"] = 20_160
    longer = RunPlan.model_validate({**dict(plan), "stages": stages})
    assert batch.request(profile, longer, ("export", "evaluate")).time_min == 20_160


def test_the_time_of_an_export_follows_its_device() -> None:
    """Four forward passes over 64 rows are a minute of a GPU's work and hours of a CPU's, had they the time."""
    wish = spec("llama2-7b", export__equality_minutes=10_000)
    cpu = throughput.export_min(LLAMA_7B, wish, tflops=None, threads=4, validation_rows=64)
    gpu = throughput.export_min(LLAMA_7B, wish, tflops=312, threads=4, validation_rows=64)
    assert cpu > 120 and gpu < 10
    assert planned(wish, site("a100")).stages["export"].time_min < 60


@pytest.mark.parametrize(("rows", "ranks"), [(16, 1), (16, 4), (12, 2), (7, 1)])
def test_the_global_batch_is_kept(rows: int, ranks: int) -> None:
    plan = planned(spec("llama2-7b", train__global_batch=rows, resources__gpus_per_node=ranks), site("a100"))
    assert plan.micro_batch * plan.accumulation * plan.world_size == rows


def test_a_longer_row_never_gets_a_larger_micro_batch() -> None:
    cut = [planned(spec("llama2-7b", data__seq_len=s), site("a100")).micro_batch for s in (512, 1024, 4096, 16384)]
    assert cut == sorted(cut, reverse=True) and cut[-1] >= 1


def test_what_does_not_fit_is_refused_with_a_way_out() -> None:
    small = site("hipergator", gpu_partition="hpg-turin", account="lab")
    with pytest.raises(InputError, match=r"does not fit.*one l4 has 22\.5 GiB.*gradient_checkpointing"):
        wish = spec("llama2-7b", train__gradient_checkpointing=False, train__micro_batch=16)
        planned(wish, small)


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InputError, match="use a multiple of 8"):
        planned(spec("llama2-7b", train__global_batch=12, resources__gpus_per_node=8), site("a100"))


def test_more_gpus_than_a_node_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"resources\.gpus_per_node: 9 asked for, a node of 'gpu' has 8"):
        planned(spec("llama2-7b", train__global_batch=9, resources__gpus_per_node=9), site("a100"))


def test_a_simulated_gpu_is_a_cpu_and_deterministic() -> None:
    plan = planned(spec(), site("local-slurm"))
    assert (plan.stages["train"].device, plan.deterministic, plan.stages["train"].gpus_per_node) == ("cpu", True, 1)


def test_the_persons_time_limit_is_kept_and_the_sites_never_passed() -> None:
    assert planned(spec("llama2-7b", resources__train_time_min=7), site("a100")).stages["train"].time_min == 7
    long = planned(spec("llama2-7b", train__epochs=100_000), site("a100"))
    assert long.stages["train"].time_min == 20160


def test_the_warning_before_the_time_limit_is_long_enough_for_a_save() -> None:
    """81 GB on half a GB/s are not written in the two minutes that an adapter gets."""
    resources = {"train__global_batch": 16, "resources__gpus_per_node": 8}
    adapter = planned(spec("llama2-7b", **resources), site("a100"))
    whole = planned(spec("llama2-7b", method__kind="full", zero__stage=3, **resources), site("a100"))
    assert adapter.stages["train"].warning_s == 120
    assert whole.stages["train"].warning_s >= 12 * LLAMA_7B.params / 0.5e9
