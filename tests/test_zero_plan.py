"""ZeRO before anything is queued: memory as the paper counts it, DeepSpeed's configuration, refusals, resizes."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import InputError
from ftlib.plan import numerics, plan, shapes, zero
from ftlib.plan.plan import RunPlan
from ftlib.rundir import RunDir
from ftlib.runs.events import Override, Settled
from jobs import changes, placement
from tests.wishes import CHECKOUT, LLAMA_7B, jobs, site, spec

LLAMA_70B = shapes.from_config(shapes.KNOWN["meta-llama/Llama-2-70b-hf"], "llama")
GB = 1e9


def of_70b(cluster: str = "a100", site_changes: dict[str, Any] | None = None, **changes: Any) -> RunPlan:
    found = site(cluster, **(site_changes or {}))
    return plan.make(spec("llama2-70b-zero3", **changes), found, LLAMA_70B, data_bytes=None)


def test_memory_falls_by_stage_as_the_paper_says() -> None:
    """arXiv 1910.02054, figure 1: 7.5B parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB.

    Here gradients are kept in fp32, so stage 1 takes twice the parameters' bf16 more, and 2 and 3 a share of that.
    """
    params, world, buckets = 7_500_000_000, 64, 12 * zero.BUCKET
    in_gb = {}
    for stage in (1, 2, 3):
        held, state = zero.gpu_bytes(params, spec("llama2-7b-full", zero__stage=stage), world)
        in_gb[stage] = (held + state - buckets - (2 * zero.LIVE if stage == 3 else 0)) / GB
    more = 2 * params / GB
    assert in_gb[1] == pytest.approx(31.4 + 2 * more, abs=0.1)
    assert in_gb[2] == pytest.approx(16.6 + more / world, abs=0.1)
    assert in_gb[3] == pytest.approx(1.9 + more / world, abs=0.1)


def test_the_70b_fits_four_nodes_its_optimizer_lies_on_the_host_for_one() -> None:
    four = of_70b()
    assert four.gpu_needed_gib and 18 * LLAMA_70B.params / 32 / 2**30 < four.gpu_needed_gib < 60
    one = of_70b(resources__nodes=1, zero__offload="cpu")
    assert one.stages["train"].mem_gib > 16 * LLAMA_70B.params / 2**30 > four.stages["train"].mem_gib
    assert four.stages["export"].gpus_per_node == 0 and four.stages["export"].mem_gib < 40
    # One GPU does not hold its 129 GiB of 16-bit weights.
    assert (four.stages["evaluate"].gpus_per_node, four.stages["evaluate"].tasks_per_node) == (3, 1)


def test_the_configuration_follows_from_the_plan() -> None:
    made = of_70b(resources__nodes=2, zero__offload="cpu")
    assert made.zero
    rows = [made.zero[f"{name}"] for name in ("train_batch_size", "train_micro_batch_size_per_gpu")]
    assert rows == [64, made.micro_batch] and made.zero["gradient_accumulation_steps"] == made.accumulation
    assert made.zero["zero_optimization"]["stage"] == 3 and made.zero["bf16"] == {"enabled": True}
    assert made.zero["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert made.zero["gradient_clipping"] == 1.0 and "optimizer" not in made.zero
    assert plan.make(spec("llama2-7b"), site("a100"), LLAMA_7B, data_bytes=None).zero is None
    here = plan.make(spec("tiny-zero2"), site("local-slurm"), LLAMA_7B, data_bytes=None).zero
    assert here and here["bf16"] == {"enabled": False} and here["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resources__nodes": 1}, r"does not fit: .* GiB .*more resources.nodes, zero.offload=cpu"),
        ({"zero__stage": 2}, r"does not fit: .* GiB .*zero.stage=3, zero.offload=cpu"),
        ({"resources__nodes": 3}, r"train.global_batch: 64 rows cannot be shared by 24 GPUs.*among \[1, 2, 4, 8"),
        ({"train__micro_batch": 4}, r"train.micro_batch: 4 does not divide a rank's 2 rows; allowed: \[1, 2\]"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        of_70b(**changes)


def test_offload_without_the_host_memory_is_refused() -> None:
    found = site("a100")
    small = [p.model_copy(update={"mem_gib_per_node": 500}) for p in found.partitions]
    wish = spec("llama2-70b-zero3", resources__nodes=1, zero__offload="cpu")
    with pytest.raises(InputError, match=r"train needs 12\d\d GiB of host memory.*'gpu' offers 500.*resources\.nodes"):
        plan.make(wish, found.model_copy(update={"partitions": tuple(small)}), LLAMA_70B, data_bytes=None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("method.kind=qlora", "zero.stage: 3 is for method.kind=full; found qlora on a 4-bit base"),
        ("method.base_bits=8", "method.base_bits: 8 does not go with method.kind=full; allowed: (16,)"),
        ("optim.name=paged_adamw_8bit", "optim.name: paged_adamw_8bit does not go with zero.stage: 3; allowed: adamw"),
        ("zero.stage=5", "zero.stage: found 5. Allowed: 0, 1, 2 or 3."),
        ("zero.stage=0 zero.offload=cpu", "offload needs a stage: use stage 1, 2 or 3"),
        ("zero.offlod=cpu", "zero.offlod is no known field (found 'cpu'). Allowed: stage, offload. Did you mean"),
        ("tokens.add=[new]", "tokens.add: no new rows are drawn where the embedding is shared out"),
        ("resources.nodes=many", "resources.nodes: input should be a valid integer"),
    ],
)
def test_wrong_input_is_told_at_submit(settings: str, said: str) -> None:
    done = jobs("plan", "--model", "llama2-70b-zero3", "--cluster", "a100", "--set", settings)
    assert done.returncode == 64 and said in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_prints_the_configuration_and_nodes_is_a_short_way() -> None:
    words = ["submit", "--model", "llama2-70b-zero3", "--cluster", "a100", "--nodes", "8", "--dry-run"]
    done = jobs(*words)
    assert done.returncode == 0, done.stderr
    text = done.stdout.split("DeepSpeed's configuration =====\n")[1].split("\n===== prepare.sbatch")[0]
    assert json.loads(text)["train_batch_size"] == 64 and json.loads(text)["zero_optimization"]["stage"] == 3
    assert re.search(r"^#SBATCH --nodes=8$", done.stdout, re.MULTILINE) and "gres=gpu:a100:8" in done.stdout


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of the tiny twin on two nodes, as submitted, whose micro-batch an earlier life has halved."""
    wish = spec("tiny-zero3", resources__nodes=2, train__global_batch=8, train__micro_batch=4)
    shape = shapes.from_config(json.loads((CHECKOUT / "models/tiny-base/config.json").read_text()), "tiny")
    made = plan.make(wish, site("local-slurm"), shape, data_bytes=None)
    found = RunDir(tmp_path)
    for folder in (found.outcomes, found.lives):
        folder.mkdir()
    found.spec_file.write_text(wish.model_dump_json())
    found.plan_file.write_text(made.model_dump_json())
    halved = Override(field="train.micro_batch", value=2, who="epilogue", why="CUDA out of memory")
    bad = Override(field="exclude.n3", value=True, who="epilogue", why="ECC", until=time.time() + 3600)
    found.record(halved, bad, writer="train-1-epilogue")
    provenance = {
        "model_path": str(CHECKOUT / wish.model.name), "cache": str(tmp_path), "data_path": None,
        "checkout": str(CHECKOUT), "profile": site("local-slurm").model_dump(mode="json"),
    }  # fmt: skip
    found.provenance_file.write_text(json.dumps(provenance))
    return found


def resize(run: RunDir, nodes: str, busy: list[str]) -> None:
    """What `make resume NODES=` records."""
    changes.record(run, changes.of_resume(run, {}, nodes, busy=busy, locks={}))


def test_a_resize_keeps_the_global_batch_and_what_earlier_lives_taught(run: RunDir) -> None:
    numerics.write(run.path, numerics.stored(run.path))
    shown = run.plan_file.read_text()
    resize(run, "1", [])
    now = run.numerics()
    assert (now.world_size, now.micro_batch, now.accumulation) == (1, 2, 4)
    assert now.zero and (now.zero["train_batch_size"], now.zero["gradient_accumulation_steps"]) == (8, 4)
    placed = placement.of(run)
    assert placed.plan.stages["train"].nodes == 1 and placed.plan.zero == now.zero
    overrides = run.ledger().overrides(time.time())
    assert (overrides.nodes, overrides.micro_batch, overrides.excluded) == (1, 2, ("n3",))
    assert run.plan_file.read_text() == shown and run.spec().resources.nodes == 2


def test_a_resize_beyond_the_micro_batch_makes_it_smaller(run: RunDir) -> None:
    numerics.write(run.path, numerics.stored(run.path))
    resize(run, "8", [])
    now = run.numerics()
    assert (now.world_size, now.micro_batch, now.accumulation) == (8, 1, 1)
    assert [(event.field, event.value) for event in run.ledger().of(Override)][-2:] == [
        ("resources.nodes", 8), ("train.micro_batch", 1)
    ]  # fmt: skip
    # The decision about an attempt that runs out of memory counts with it, too.
    cause = "GPU memory"
    run.record(Settled(stage="train", attempt=1, job_id="7", cause=cause, by="epilogue"), writer="train-1-epilogue")
    ledger = run.ledger()
    assert (ledger.micro_batch, ledger.rows_of_a_rank) == (4, 1)


def test_a_resize_of_a_run_of_the_first_release_is_seen_by_its_own_code_too(run: RunDir) -> None:
    """Which reads micro-batch and accumulation in adjustments.json and plan.json, and would keep the old ones."""
    shutil.rmtree(run.events)
    file = run.path / "adjustments.json"
    adjusted = {"micro_batch": 2, "accumulation": 2, "exclude": {"n3": time.time() + 3600}}
    notes = ["micro-batch 4 -> 2: CUDA out of memory", "node n3 is left out for 24 h: ECC"]
    file.write_text(json.dumps({**adjusted, "notes": notes}))
    assert (run.numerics().micro_batch, run.numerics().accumulation) == (2, 2)
    resize(run, "1", [])
    assert "micro_batch" not in json.loads(file.read_text()) and "accumulation" not in json.loads(file.read_text())
    for now in (run.plan(), run.numerics().model_dump()):
        assert (now["micro_batch"], now["accumulation"]) == (2, 4)
    assert run.ledger().overrides(time.time()).excluded == ("n3",)


@pytest.mark.parametrize(
    ("nodes", "busy", "said"),
    [
        ("two", [], "NODES: 'two' is no number of nodes"),
        ("0", [], "allowed: 1 and more"),
        ("3", [], "8 rows cannot be shared by 3 GPUs"),
        ("1", ["train"], "NODES: train of .* is queued or running with the nodes it has. make cancel"),
    ],
)
def test_a_resize_that_cannot_be_changes_nothing(run: RunDir, nodes: str, busy: list[str], said: str) -> None:
    before = run.plan_file.read_text(), run.ledger()
    with pytest.raises(InputError, match=said):
        resize(run, nodes, busy)
    assert before[0] == run.plan_file.read_text() and before[1].events == run.ledger().events
