"""What the plan requests for an export: memory that follows the largest tensor, not the model; time by the budget."""

from __future__ import annotations

import pytest

from ftlib.plan import memory, throughput
from ftlib.plan.shapes import KNOWN, ModelShape, from_config
from ftlib.spec import RunSpec, validate

GB = 1e9
LARGE = ("meta-llama/Llama-2-7b-hf", "codellama/CodeLlama-13b-hf", "meta-llama/Llama-2-70b-hf")


def spec_of(**sections: object) -> RunSpec:
    return validate(RunSpec, {"recipe": "test", "model": {"name": "m"}, "train": {"steps": 10}, **sections}, "test")


def shape_of(name: str) -> ModelShape:
    return from_config(KNOWN[name], name)


@pytest.mark.parametrize("name", LARGE)
def test_host_memory_is_a_shard_and_four_copies_of_the_largest_tensor(name: str) -> None:
    shape, spec = shape_of(name), spec_of()
    largest = max(p.size for p in shape.parameters)
    adapter = 4 * memory.added_params(shape, spec)
    host = memory.export_host_gib(shape, spec, on_gpu=True) - memory.INTERPRETER_GIB
    assert host == pytest.approx((5e9 + 16 * largest + adapter) / 2**30)
    assert host < 12, "whatever the model's size"


def test_what_computes_on_a_cpu_holds_a_model_there() -> None:
    shape, spec = shape_of("meta-llama/Llama-2-7b-hf"), spec_of()
    assert memory.export_host_gib(shape, spec, on_gpu=False) > 2 * shape.params / 2**30
    only_adapter = spec_of(export={"merged": False})
    assert memory.export_host_gib(shape, only_adapter, on_gpu=True) < memory.export_host_gib(shape, spec, on_gpu=True)


def test_gpu_memory_is_the_trained_model_and_a_forward_pass() -> None:
    shape, spec = shape_of("meta-llama/Llama-2-7b-hf"), spec_of()
    gpu = memory.export_gpu_gib(shape, spec)
    assert memory.training(shape, spec, 1).weights_gib < gpu < memory.training(shape, spec, 8).total_gib + 2
    full = spec_of(method={"kind": "full"}, optim={"name": "adamw_torch"}, zero={"stage": 3})
    assert memory.export_gpu_gib(shape, full) == 0


def test_the_comparison_takes_its_budget_at_most() -> None:
    shape = shape_of("meta-llama/Llama-2-7b-hf")
    minutes = [
        throughput.export_min(
            shape, spec_of(export={"equality_minutes": budget}), tflops=None, threads=4, validation_rows=1000)
        for budget in (1, 10, 1e6)]
    assert minutes[1] - minutes[0] == pytest.approx(9) and minutes[2] > 60


def test_the_formulas_use_the_limits_of_the_code() -> None:
    pytest.importorskip("torch", reason="export needs torch: the train extra")
    from ftlib.export import equality, shards

    assert (shards.SHARD_BYTES, equality.ROWS) == (memory.SHARD_BYTES, memory.COMPARED_ROWS)
    assert equality.BATCH_LOGITS == memory.COMPARED_LOGITS
