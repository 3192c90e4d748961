"""Before anything is queued: does it fit, how is the batch cut, what does it ask for."""

from __future__ import annotations

import pytest

from ftlib.errors import InputError
from ftlib.plan import memory, throughput
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
