"""Every method is trained, stopped, resumed to the bit, exported and evaluated; what does not fit is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import InputError, Interrupted
from ftlib.metrics import MetricsWriter, read_metrics
from ftlib.plan import memory
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from jobs import wish
from tests.wishes import LLAMA_7B, spec

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="training needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

import peft  # noqa: E402
import safetensors.torch  # noqa: E402

from benchmarks.lives import sha  # noqa: E402
from benchmarks.methods import HALF, METHODS, SHORT, STEPS, make_run  # noqa: E402
from ftlib import checkpoint  # noqa: E402
from ftlib.data import tokenizing  # noqa: E402
from ftlib.data.dataset import Order, PackedRows, collate  # noqa: E402
from ftlib.evaluate import answering  # noqa: E402
from ftlib.evaluate import evaluate as evaluating  # noqa: E402
from ftlib.evaluate.evaluate import evaluate  # noqa: E402
from ftlib.export.run import export  # noqa: E402
from ftlib.train import methods, model, saving  # noqa: E402
from ftlib.train.run import train  # noqa: E402
from tests.test_train import torch_as_it_was  # noqa: E402

__all__ = ["torch_as_it_was"]
CPU = torch.device("cpu")
SMALL = SHORT + "data.limit=60 data.seq_len=128 evaluate.max_new_tokens=4 "
TUNED_FILES = {
    "full": ["merged"], "freeze": ["merged"], "two-stage": ["adapter", "merged", "prompt"],
    "prompt, random": ["adapter"], "prompt, from text": ["adapter"],
}  # fmt: skip


def live(run: RunDir, life: int, stop_after: int | None = None) -> str:
    """One life of the training; with `stop_after` it is interrupted there."""
    stop, append = StopFlag(), MetricsWriter.append

    def watched(self: MetricsWriter, **row: Any) -> None:
        append(self, **row)
        if row["step"] == stop_after and "loss" in row:
            stop.cause = "a test"

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as stack:
        monkeypatch.setattr(MetricsWriter, "append", watched)
        if stop_after:
            stack.enter_context(pytest.raises(Interrupted))
        return train(run, life, stop)
    return ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


def fresh(root: Path, name: str, recipe: str, settings: str) -> RunDir:
    shutil.rmtree(root / name, ignore_errors=True)
    return make_run(root / name / "a-run", root / "cache", recipe, SMALL + settings)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_resumes_to_the_bit_and_is_exported_and_evaluated(name: str, root: Path) -> None:
    recipe, settings = METHODS[name]
    settings += " optim.lr=0.01"
    whole, halved = fresh(root, "whole", recipe, settings), fresh(root, "halved", recipe, settings)
    live(whole, 1)
    live(halved, 1, HALF)
    live(halved, 2)
    assert len({sha(checkpoint.folder_for(run.checkpoints, STEPS)) for run in (whole, halved)}) == 1
    losses = [row["loss"] for row in read_metrics(whole.metrics_file)]
    assert losses == [row["loss"] for row in read_metrics(halved.metrics_file)] and losses[-1] < losses[0]
    export(whole, 1, StopFlag())
    made = sorted(path.name for path in whole.export.iterdir() if path.is_dir())
    assert made == TUNED_FILES.get(name, ["adapter", "merged"])
    equality = json.loads((whole.export / "equality.json").read_text())
    assert equality["passed"] and equality["tokens"] > 100
    scores = evaluate(whole, StopFlag())
    assert scores["tuned"]["perplexity"] < scores["base"]["perplexity"]


def test_two_stages_train_the_prompt_then_the_weights_at_their_own_rates(root: Path) -> None:
    settings = METHODS["two-stage"][1] + " method.prompt_lr=0.1 optim.lr=0.01 optim.schedule=constant"
    run = fresh(root, "stages", "tiny-llama3", settings + " train.keep_every_steps=2")
    live(run, 1)
    steps = [checkpoint.folder_for(run.checkpoints, step) for step in (2, 4, 6, 8)]
    prompts = [(step / "prompt" / "adapter_model.safetensors").read_bytes() for step in steps]
    adapters = [(step / "adapter_model.safetensors").read_bytes() for step in steps]
    assert prompts[0] != prompts[1] == prompts[2] == prompts[3]
    assert adapters[0] == adapters[1] != adapters[2] != adapters[3]
    optimizer = torch.load(steps[-1] / "optimizer.pt", weights_only=True)
    assert [group["initial_lr"] for group in optimizer["param_groups"] if group["params"]] == [0.01, 0.1]


def test_a_soft_prompt_is_trained_on_single_documents_and_answers_alike_in_any_batch(root: Path) -> None:
    """peft drops position ids: neither packed rows nor left padding may change what a document is to the model."""
    run = fresh(root, "soft", *METHODS["prompt, from text"])
    rows: Any = PackedRows(Path(run.prepared()["dataset"]) / "train")
    assert all((rows[i]["input_ids"] == rows[0]["input_ids"][0]).sum() == 1 for i in range(5)), "one document a row"
    batch = collate([rows[i] for i in range(4)])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].shape[1] == max(int(rows[i]["attention_mask"].sum()) for i in range(4))

    live(run, 1)
    first = read_metrics(run.metrics_file)[0]["loss"]
    export(run, 1, StopFlag())
    path, adapter = run.provenance()["model_path"], run.export / "adapter"
    start = methods.attach(model.load_base(run.spec(), path, CPU), run.spec(), path).eval()
    order = iter(Order(len(rows), 4, run.spec().train.seed))
    inputs = collate([rows[i] for i in order])
    targets = inputs["labels"].ne(-100).sum()
    with torch.no_grad():
        assert first == pytest.approx(float(start(**inputs, num_items_in_batch=targets).loss), rel=1e-4)

    trained = methods.load_trained(run.spec(), path, CPU, checkpoint.folder_for(run.checkpoints, STEPS))
    plain = model.load_base(run.spec(), path, CPU).eval()
    prefix = methods.put_prompt(plain, adapter)
    with torch.no_grad():
        ours = plain(torch.tensor([prefix + batch["input_ids"][0].tolist()])).logits[:, len(prefix) :]
        pefts = trained(input_ids=batch["input_ids"][:1]).logits[:, len(prefix) :]
    torch.testing.assert_close(ours, pefts)
    assert peft.PeftModel.from_pretrained(model.load_base(run.spec(), path, CPU), str(adapter)).active_peft_config
    answerer = answering.Answerer(plain, tokenizing.load(path), max_new_tokens=6, stop=StopFlag(), prefix=prefix)
    prompts, responses = ["Short", "A much longer prompt, so that the other one is padded"], ["yes", "no, never"]
    assert answerer.answers(prompts) == [answerer.answers([prompt])[0] for prompt in prompts]
    alone = [answerer.nll([prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)]
    assert [n for n, _ in answerer.nll(prompts, responses)] == pytest.approx([n for n, _ in alone], rel=1e-4)


def test_frozen_layers_do_not_change_and_a_checkpoint_holds_the_trained_ones_alone(root: Path) -> None:
    run = fresh(root, "frozen", *METHODS["freeze"])
    live(run, 1)
    saved = safetensors.torch.load_file(checkpoint.folder_for(run.checkpoints, STEPS) / methods.TRAINED)
    blocks = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert sorted(saved) == sorted([*blocks, "lm_head.weight"])
    export(run, 1, StopFlag())
    merged = safetensors.torch.load_file(run.export / "merged" / "model.safetensors")
    base = model.load_base(run.spec(), run.provenance()["model_path"], CPU).state_dict()
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == set(saved)


def test_new_tokens_have_the_same_first_rows_everywhere_and_are_in_all_that_is_exported(root: Path) -> None:
    recipe, settings = METHODS["qlora, new tokens"]
    run, other = fresh(root, "tokens", recipe, settings), fresh(root, "plain", *METHODS["qlora"])
    assert run.prepared()["digest"] != other.prepared()["digest"]
    path = run.provenance()["model_path"]
    known = len(tokenizing.load(path))
    rows = [model.load_base(run.spec(), path, CPU).get_input_embeddings().weight[known:] for _ in range(2)]
    assert torch.equal(*rows) and rows[0].shape[0] == 2 and not torch.equal(rows[0][0], rows[0][1])
    live(run, 1)
    size = sum(f.stat().st_size for f in checkpoint.folder_for(run.checkpoints, STEPS).glob("adapter_model*"))
    live(other, 1)
    plain = sum(f.stat().st_size for f in checkpoint.folder_for(other.checkpoints, STEPS).glob("adapter_model*"))
    assert size < plain + 4096, "the rows of two tokens, not the embedding"
    export(run, 1, StopFlag())
    for place in ("adapter", "merged"):
        words = transformers.AutoTokenizer.from_pretrained(run.export / place)
        assert known in words("### Instruction:")["input_ids"] and len(words) == known + 2
    merged = transformers.AutoModelForCausalLM.from_pretrained(run.export / "merged")
    assert not torch.equal(merged.get_input_embeddings().weight[known:], rows[0])
    assert not torch.equal(merged.get_output_embeddings().weight[known:], merged.get_input_embeddings().weight[known:])


def test_falcon_is_quantised_and_its_packed_documents_do_not_see_each_other(root: Path) -> None:
    run = fresh(root, "falcon", "tiny-falcon", "")
    base = model.load_base(run.spec(), run.provenance()["model_path"], CPU)
    assert len(model.quantised_layers(base)) == 2 * 4
    ids = torch.arange(10, 22)[None]
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    positions = torch.tensor([[*range(5), *range(7)]])
    logits = base(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
    logits[0, 5:].square().sum().backward()
    assert embedded.grad[0, :5].abs().max() == 0.0 and embedded.grad[0, 5:].abs().min() > 0
    second = base(ids[:, 5:], use_cache=False).logits
    torch.testing.assert_close(logits[:, 5:], second, rtol=1e-2, atol=1e-2)


def test_a_training_that_gets_no_better_ends_and_its_best_checkpoint_is_exported(root: Path) -> None:
    settings = METHODS["lora"][1] + " optim.lr=0.5 optim.schedule=constant train.eval_every_steps=1 train.steps=30"
    settings += " train.stop_after_worse=3 train.keep_best=true export.max_logit_diff=10"
    run = fresh(root, "early", "tiny-llama3", settings)
    words = live(run, 1)
    losses = [row["eval_loss"] for row in read_metrics(run.metrics_file) if "eval_loss" in row]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 3 < 30 and f"trained {best + 3} steps of 30, stopped early" in words
    found = saving.find(run)
    assert found.step == best + 3 and found.complete and found.best == (min(losses), best)
    assert live(run, 2).startswith("already trained")
    export(run, 1, StopFlag())
    kept = checkpoint.folder_for(run.checkpoints, best) / "adapter_model.safetensors"
    assert (run.export / "adapter" / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    assert json.loads((run.export / "equality.json").read_text())["checkpoint"] == kept.parent.name

    halved = fresh(root, "early-halved", "tiny-llama3", settings)
    live(halved, 1, best + 2)
    live(halved, 2)
    assert saving.find(halved).step == best + 3


def test_few_shot_examples_stand_before_the_base_models_questions(root: Path) -> None:
    run = fresh(root, "shots", "tiny-llama3", METHODS["lora"][1] + " evaluate.few_shot=2")
    live(run, 1)
    export(run, 1, StopFlag())
    scores = evaluate(run, StopFlag())
    assert list(scores)[:4] == ["base", "few_shot", "tuned", "copy"]
    assert scores["few_shot"]["n"] == scores["base"]["n"]
    assert scores["few_shot"]["perplexity"] != scores["base"]["perplexity"]
    words = tokenizing.load(run.provenance()["model_path"])
    ids = evaluating._examples(Path(run.prepared()["dataset"]) / "train", 2, words, 10_000)
    assert ids.count(words.eos) == 2 and ids.count(words.bos[0]) == 1 and ids[0] == words.bos[0]
    fewer = evaluating._examples(Path(run.prepared()["dataset"]) / "train", 2, words, len(ids) - 1)
    assert fewer == ids[: ids.index(words.eos) + 1]


def test_a_run_begins_where_another_ended(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From merged weights, which are its base, or from an adapter."""
    recipe, settings = METHODS["lora"]
    first = fresh(root, "first", recipe, settings + " optim.lr=0.01")
    live(first, 1)
    export(first, 1, StopFlag())
    merged = fresh(root, "from-merged", recipe, settings + f" model.init_from={first.export}")
    assert merged.provenance()["model_path"] == str(first.export / "merged")
    adapter = fresh(root, "from-adapter", recipe, settings + f" model.init_from={first.export / 'adapter'}")
    ends = [row["loss"] for row in read_metrics(first.metrics_file)]
    for run in (merged, adapter):
        live(run, 1)
        begins = read_metrics(run.metrics_file)[0]["loss"]
        assert begins < ends[0] - 0.1
    assert "the adapter begins as" in capsys.readouterr().out


REFUSED = {
    "method.kind=freeze method.train_layers=[28-31,lm_hed]": ["blocks are 0-1", "Did you mean lm_head?"],
    "method.kind=freeze method.train_layers=[]": ["method.train_layers: is missing"],
    "method.kind=lora method.train_layers=[] method.targets=[q_prj]": ["method.targets", "q_proj"],
    "method.kind=prompt method.train_layers=[] export.merged=true": ["export.merged", "leave it out"],
    "method.kind=full method.train_layers=[] export.merged=false": ["export.merged", "use true"],
    "method.kind=full method.train_layers=[] method.base_bits=8": ["method.base_bits: 8", "allowed: (16,)"],
    "method.kind=lora method.train_layers=[] method.base_bits=4": ["method.base_bits: 4", "method.kind=qlora"],
    "method.kind=lora": ["method.train_layers: has no effect"],
    "method.kind=full method.train_layers=[] method.dora=true": ["method.dora: has no effect"],
    "method.kind=prompt method.train_layers=[] tokens.add=[<x>]": ["tokens.add"],
    "model.init_from=models/tiny-falcon": ["model.init_from", "does not fit"],
    "model.init_from=nowhere": ["model.init_from", "'nowhere' is no finished run"],
    "train.global_batch=6 train.micro_batch=4": ["global_batch 6"],
    "train.keep_best=true": ["need eval_every_steps"],
    "method.train_layers=[9] export.merged=false method.base_bits=8": ["train_layers", "export.merged", "bits: 8"],
}


@pytest.mark.parametrize("settings", REFUSED)
def test_what_does_not_fit_is_refused_before_a_job_is_queued(settings: str) -> None:
    with pytest.raises(InputError) as caught:
        wish.make(model="tiny-llama3", data=None, cluster="local", settings=settings)
    assert all(word in "\n".join(caught.value.messages) for word in REFUSED[settings]), caught.value.messages


def test_an_adapter_of_another_shape_is_refused(root: Path) -> None:
    recipe, settings = METHODS["lora"]
    run = fresh(root, "other-rank", recipe, settings)
    live(run, 1)
    export(run, 1, StopFlag())
    start = settings + f" model.init_from={run.export / 'adapter'}"
    wish.make(model=recipe, data=None, cluster="local", settings=start)
    for wrong in ("method.rank=4", "method.targets=[q_proj]", "method.dora=true", "model.name=models/tiny-falcon"):
        with pytest.raises(InputError, match="does not fit"):
            wish.make(model=recipe, data=None, cluster="local", settings=f"{start} {wrong}")


def test_memory_of_each_method_follows_what_it_trains() -> None:
    def gib(**changes: Any) -> Any:
        return memory.training(LLAMA_7B, spec("llama2-7b", **changes), 1)

    full = gib(method__kind="full", optim__name="adamw_torch")
    assert full.weights_gib == 0 and full.trained_gib == pytest.approx(6.74e9 * 16 / 2**30, rel=0.01)
    freeze = gib(method__kind="freeze", method__train_layers=["28-31"], optim__name="adamw_torch")
    assert freeze.trained_gib == pytest.approx(full.trained_gib * 4 / 32 * 6.48 / 6.74, rel=0.01)
    bases = (("qlora", 4), ("lora", 8), ("lora", 16))
    weights = [gib(method__kind=kind, method__base_bits=bits).weights_gib for kind, bits in bases]
    assert weights == sorted(weights) and weights[1] == pytest.approx(6.5, abs=0.3)
    assert gib(method__kind="prompt").trained_gib < 1e-3 < gib(method__kind="lora").trained_gib
