"""Training: NF4 for real, and a run that is the same however often it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlib import checkpoint
from ftlib.errors import FtError, InputError, Interrupted
from ftlib.metrics import MetricsWriter, read_metrics
from ftlib.plan import numerics, zero
from ftlib.rundir import STAGES, RunDir
from ftlib.runs.events import CheckpointSaved, FirstStep, Resumed
from ftlib.spec import RunSpec, validate
from ftlib.stop import StopFlag

torch = pytest.importorskip("torch", reason="training needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="training needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="training needs bitsandbytes: the train extra")

from ftlib.data.dataset import Order, PackedRows  # noqa: E402
from ftlib.train import run as training  # noqa: E402
from ftlib.train.model import attach_adapter, check_quantised, linear_names, load_base, quantised_layers  # noqa: E402

STEPS, ROWS, SEQ_LEN, VOCABULARY = 30, 44, 48, 97
MakeRun = Callable[..., RunDir]


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Training sets the process up for itself; other tests shall not feel it."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("base model")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows by the on-disk format: tokens, response and positions, all of one shape."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder)
    return folder


def write_base(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.set_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(folder)


def write_dataset(folder: Path) -> None:
    """Documents whose response repeats their prompt; two or three to a row, then padding."""
    rng = np.random.default_rng(5)
    for split, rows in (("train", ROWS), ("validation", 36)):
        arrays = {
            "tokens": np.full((rows, SEQ_LEN), 2, "uint16"),
            "response": np.zeros((rows, SEQ_LEN), "uint8"),
            "positions": np.zeros((rows, SEQ_LEN), "uint16"),
        }
        for row in range(rows):
            at = 0
            while at + 20 <= SEQ_LEN:
                words = rng.integers(3, VOCABULARY, rng.integers(4, 9))
                document = [1, *words, *words, 2]
                end = at + len(document)
                arrays["tokens"][row, at:end] = document
                arrays["response"][row, at + 1 + len(words) : end] = 1
                arrays["positions"][row, at:end] = range(len(document))
                at = end
            arrays["positions"][row, at:] = range(SEQ_LEN - at)
        (folder / split).mkdir()
        for name, array in arrays.items():
            array.tofile(folder / split / f"{name}.bin")
        meta = {"rows": rows, "seq_len": SEQ_LEN, "dtype": {name: str(array.dtype) for name, array in arrays.items()}}
        (folder / split / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def make_run(tmp_path: Path, base: Path, dataset: Path) -> MakeRun:
    def make(name: str = "a-run", model: Path = base, micro_batch: int = 2, **overrides: dict[str, Any]) -> RunDir:
        return write_run(tmp_path / name / "the-run", model, dataset, micro_batch, **overrides)

    return make


def write_run(folder: Path, model: Path, dataset: Path, micro_batch: int = 2, **overrides: dict[str, Any]) -> RunDir:
    """A run folder as `submit` and `prepare` leave it. Always of the same name: a checkpoint knows its run's."""
    wish: dict[str, Any] = {
        "recipe": "test",
        "model": {"name": str(model)},
        "data": {"seq_len": SEQ_LEN},
        "method": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "optim": {"name": "adamw_torch", "lr": 1e-2},
        "train": {"steps": STEPS, "global_batch": 4, "eval_every_steps": 10, "save_every_steps": 8, "seed": 1,
                  "gradient_checkpointing": False, "log_every_steps": 10},
        "tracking": {"mode": "disabled"},
    }  # fmt: skip
    for section, values in overrides.items():
        wish[section] = {**wish.get(section, {}), **values}
    spec = validate(RunSpec, wish, "test")
    run = RunDir(folder)
    run.checkpoints.mkdir(parents=True)
    run.spec_file.write_text(json.dumps(spec.model_dump(mode="json")))
    batch = {"micro_batch": micro_batch, "accumulation": 4 // micro_batch}
    stage = {"device": "cpu", "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
    plan: dict[str, Any] = {**batch, "threads": 1, "compute_dtype": "float32", "stages": dict.fromkeys(STAGES, stage)}
    if spec.zero.stage:
        plan["zero"] = zero.config(spec, **batch, world_size=1, on_gpu=False, compute_dtype="float32")
    run.plan_file.write_text(json.dumps(plan))
    numerics.write(run.path, numerics.first(spec, plan, {}))
    run.provenance_file.write_text(json.dumps({"model_path": str(model), "cache": str(folder / "cache")}))
    run.prepared_file.write_text(json.dumps({"dataset": str(dataset), "train": {"rows": ROWS}}))
    return run


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: StopFlag, step: int) -> None:
    """A stop is asked for right after `step` was computed."""
    append = MetricsWriter.append

    def watched(self: MetricsWriter, **row: Any) -> None:
        append(self, **row)
        if row["step"] == step and "loss" in row:
            stop.cause = "preemption"

    monkeypatch.setattr(MetricsWriter, "append", watched)


def live(run: RunDir, life: int, stop_after: int | None = None) -> str:
    """One life; with `stop_after` it is interrupted there."""
    stop = StopFlag()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if stop_after is None:
            return training.train(run, life, stop)
        stop_at(monkeypatch, stop, stop_after)
        with pytest.raises(Interrupted) as caught:
            training.train(run, life, stop)
    assert caught.value.step == stop_after and caught.value.cause == "preemption"
    return str(caught.value)


def adapter_sha(run: RunDir, step: int = STEPS) -> str:
    weights = checkpoint.folder_for(run.checkpoints, step) / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def trajectory(run: RunDir) -> list[tuple[Any, ...]]:
    """What must be equal between two runs: everything but the clock and the life."""
    names = ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss")
    return [tuple(row.get(name) for name in names) for row in read_metrics(run.metrics_file)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, dataset: Path) -> RunDir:
    run = write_run(tmp_path_factory.mktemp("uninterrupted") / "the-run", base, dataset)
    words = live(run, 1)
    assert words.startswith(f"trained {STEPS} steps, loss ")
    return run


def test_metrics_have_every_step_once_and_the_loss_falls(uninterrupted: RunDir) -> None:
    rows = read_metrics(uninterrupted.metrics_file)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20, 30]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "life", "time"} == set(steps[0])
    assert sum(row["loss"] for row in steps[-5:]) < 0.9 * sum(row["loss"] for row in steps[:5])
    assert all(0 < row["tokens"] < 4 * SEQ_LEN for row in steps), "padding is not counted"
    kept = [folder.name for folder in checkpoint.committed(uninterrupted.checkpoints)]
    assert kept == ["step-00000030", "step-00000024"]
    saved = uninterrupted.ledger().of(CheckpointSaved)
    assert [event.step for event in saved] == [8, 10, 16, 20, 24, 30], "each due one, and each new best"
    assert all(event.seconds > 0 and event.bytes > 10_000 for event in saved)


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([5, 13], id="within-an-epoch-and-past-its-end"),
        pytest.param([10, 24, 29], id="before-a-due-evaluation-and-at-a-due-save"),
    ],
)
def test_resumed_equals_uninterrupted(make_run: MakeRun, uninterrupted: RunDir, stops: list[int]) -> None:
    """Dropout, two micro-batches a step, evaluations in between, several epochs: to the last bit."""
    run = make_run()
    for life, stop in enumerate(stops, start=1):
        live(run, life, stop_after=stop)
    live(run, len(stops) + 1)
    assert trajectory(run) == trajectory(uninterrupted)
    assert adapter_sha(run) == adapter_sha(uninterrupted)
    resumed = [event.step for event in run.ledger().of(Resumed)]
    assert resumed == stops


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from ftlib.metrics import MetricsWriter
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag
from ftlib.train.run import train

append = MetricsWriter.append

def killing(self, **row):
    append(self, **row)
    if row["step"] == 18:
        self._file.write('{"step": 19, "lo')
        os.kill(os.getpid(), signal.SIGKILL)

MetricsWriter.append = killing
train(RunDir(Path(sys.argv[1])), 2, StopFlag())
"""


def test_a_fresh_process_goes_on_and_its_sudden_death_loses_nothing(make_run: MakeRun, uninterrupted: RunDir) -> None:
    """It resumes at 8, commits 10 (the best) and 16, and is killed at 18, in the middle of a row."""
    run = make_run()
    live(run, 1, stop_after=8)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(run.path)], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [folder.name for folder in checkpoint.committed(run.checkpoints)] == ["step-00000016", "step-00000010"]
    live(run, 3)
    assert trajectory(run) == trajectory(uninterrupted)
    assert adapter_sha(run) == adapter_sha(uninterrupted)


def test_a_stop_during_an_evaluation_leaves_it_due(make_run: MakeRun, uninterrupted: RunDir) -> None:
    run, stop = make_run(), StopFlag()

    class Watched(PackedRows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if self.folder.name == "validation" and index == 9:
                stop.cause = "time limit"
            return super().__getitem__(index)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "PackedRows", Watched)
        with pytest.raises(Interrupted) as caught:
            training.train(run, 1, stop)
        assert caught.value.step == 10 and caught.value.cause == "time limit"
        assert [row for row in read_metrics(run.metrics_file) if "eval_loss" in row] == []
        stop.cause = None
        with pytest.raises(Interrupted) as caught:  # Again during the evaluation that the next life does first.
            training.train(run, 2, stop)
        assert caught.value.step == 10
    live(run, 3)
    assert trajectory(run) == trajectory(uninterrupted)
    assert adapter_sha(run) == adapter_sha(uninterrupted)


def test_when_it_saves_changes_nothing(make_run: MakeRun, uninterrupted: RunDir) -> None:
    for name, train in (("measured", {"save_every_steps": None}), ("every-step", {"save_every_steps": 1})):
        run = make_run(name, train=train)
        live(run, 1)
        assert trajectory(run) == trajectory(uninterrupted) and adapter_sha(run) == adapter_sha(uninterrupted)


def test_without_an_interval_it_saves_early_and_says_what_follows(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(train={"save_every_steps": None, "eval_every_steps": None})
    live(run, 1)
    saved = [event.step for event in run.ledger().of(CheckpointSaved)]
    assert saved == [20, 30], "before the first save its cost is not known"
    said = capsys.readouterr().out
    assert "a checkpoint every" in said and "a kill without warning is expected every 24 h (0 in 0.0 h so far)" in said


def test_the_best_and_every_nth_are_kept(make_run: MakeRun) -> None:
    run = make_run(train={"steps": 20, "eval_every_steps": 5, "keep_every_steps": 8, "save_every_steps": 3})
    losses = iter([3.0, 2.0, 4.0, 5.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftlib.train.trainer.FineTuner.evaluate", lambda self: {"eval_loss": next(losses)})
        live(run, 1, stop_after=13)
        live(run, 2)  # The best is known to a later life, too.
    kept = [checkpoint.step_of(folder) for folder in checkpoint.committed(run.checkpoints)]
    assert kept == [20, 18, 16, 10, 8]


def test_the_parts_of_a_start_are_recorded(make_run: MakeRun) -> None:
    run = make_run(train={"steps": 4, "eval_every_steps": None})
    live(run, 1, stop_after=2)
    live(run, 2)
    firsts = run.ledger().of(FirstStep)
    assert [(event.attempt, event.step) for event in firsts] == [(1, 1), (2, 3)]
    parts = {"imports_s", "check_s", "load_s", "optimizer_s", "first_step_s"}
    assert all(parts <= event.parts_s.keys() and all(event.parts_s[part] >= 0 for part in parts) for event in firsts)


def test_an_evaluation_changes_no_weights(make_run: MakeRun, uninterrupted: RunDir) -> None:
    """A 4-bit layer that was once in eval mode must still give gradients, and no random number may be drawn."""
    run = make_run(train={"eval_every_steps": None})
    live(run, 1)
    assert adapter_sha(run) == adapter_sha(uninterrupted)


def test_another_micro_batch_reads_the_same_rows(make_run: MakeRun, uninterrupted: RunDir) -> None:
    """Half the micro-batch and twice the accumulation: the same rows and the same loss a step, but for rounding."""
    spec = {"method": {"dropout": 0.0}, "train": {"steps": 12, "eval_every_steps": None}}
    losses = []
    for micro_batch in (4, 1):
        run = make_run(f"micro-{micro_batch}", micro_batch=micro_batch, **spec)
        live(run, 1)
        losses.append([(row["tokens"], row["loss"]) for row in read_metrics(run.metrics_file)])
    for (tokens, loss), (other_tokens, other_loss) in zip(*losses, strict=True):
        assert tokens == other_tokens and loss == pytest.approx(other_loss, rel=0.02)


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(
    make_run: MakeRun, uninterrupted: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    live(run, 1, stop_after=16)
    weights = checkpoint.folder_for(run.checkpoints, 16) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    live(run, 2)
    said = capsys.readouterr().out
    assert "step-00000016 is damaged" in said and "does not match its checksum" in said
    assert "goes on from step 10" in said
    assert trajectory(run) == trajectory(uninterrupted)
    assert adapter_sha(run) == adapter_sha(uninterrupted)


def test_a_life_imports_only_what_it_uses() -> None:
    """The compiler and datasets take more than a second of every life's start."""
    heavy = ("pandas", "datasets", "torch._inductor.compile_fx", "wandb")
    code = f"import sys, ftlib.train.run; print([name for name in {heavy} if name in sys.modules])"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"


def test_a_finished_training_is_not_done_again(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(train={"steps": 3})
    live(run, 1)
    before = run.metrics_file.read_bytes()
    monkeypatch.setattr(training, "load_base", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert live(run, 2).startswith("already trained: the checkpoint of step 3")
    assert run.metrics_file.read_bytes() == before


def test_a_flag_before_the_first_step_stops_at_once(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while the base model is being loaded, which may take longer than a grace period."""
    run, stop = make_run(), StopFlag()

    def slow(*_: Any, **__: Any) -> None:
        stop.cause = "preemption"
        time.sleep(20)

    monkeypatch.setattr(training, "load_base", slow)
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        training.train(run, 1, stop)
    assert caught.value.step is None and time.monotonic() - began < 2
    assert not list(run.checkpoints.iterdir())


def test_every_linear_layer_is_quantised(base: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_base(make_run().spec(), str(base), torch.device("cpu"))
    layers = quantised_layers(model)
    assert len(layers) == 2 * 7 and "14 linear layers quantised to nf4" in capsys.readouterr().out
    assert all(layer.weight.dtype is torch.uint8 and layer.weight.quant_type == "nf4" for layer in layers.values())
    assert all(layer.weight.quant_state.nested for layer in layers.values()), "double quantisation"
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    with pytest.raises(FtError, match=r"0 of 14 linear layers are; not quantised"):
        check_quantised(transformers.AutoModelForCausalLM.from_pretrained(base), linear_names(model.config))


def test_lora_leaves_the_base_as_it_is(base: Path, make_run: MakeRun) -> None:
    run = make_run(method={"kind": "lora"}, train={"steps": 2, "eval_every_steps": None})
    assert not quantised_layers(load_base(run.spec(), str(base), torch.device("cpu")))
    assert live(run, 1).startswith("trained 2 steps")


def test_wrong_targets_name_the_right_ones(base: Path, make_run: MakeRun) -> None:
    spec = make_run(method={"targets": ["q_proj", "v_porj"]}).spec()
    model = load_base(spec, str(base), torch.device("cpu"))
    with pytest.raises(InputError, match=r"'v_porj' is unknown. Allowed: down_proj, .*Did you mean v_proj\?"):
        attach_adapter(model, spec.method, 0)


def test_missing_model_files_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=r"config\.json.*model\.safetensors"):
        live(make_run(model=tmp_path), 1)


def test_divergence_is_said_in_words(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(train={"steps": 3})
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: item(self) * float("nan"))
    with pytest.raises(FtError, match=r"diverged at step 1: loss nan.*lower optim\.lr"):
        live(run, 1)


def test_a_life_without_room_for_a_checkpoint_harms_nothing(
    make_run: MakeRun, uninterrupted: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    live(run, 1, stop_after=8)
    with monkeypatch.context() as patch:
        patch.setattr("ftlib.train.saving.atomic.shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
        with pytest.raises(FtError, match=r"No space left on device .* for a checkpoint of about"):
            live(run, 2)
    live(run, 3)
    assert adapter_sha(run) == adapter_sha(uninterrupted)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_disk_that_fills_while_saving_harms_nothing(
    make_run: MakeRun, uninterrupted: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k", "none", run.checkpoints], capture_output=True, timeout=300
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    # Room is checked before each save; here it goes between the check and the write.
    monkeypatch.setattr("ftlib.atomic.require_space", lambda *_: None)
    filler = run.checkpoints / "filler"
    try:
        live(run, 1, stop_after=8)
        filler.write_bytes(bytes(shutil.disk_usage(run.checkpoints).free - (60 << 10)))
        with pytest.raises(FtError, match=r"No space left on device.*Earlier ones are whole"):
            live(run, 2)
        filler.unlink()
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000008"]
        live(run, 3)
        assert adapter_sha(run) == adapter_sha(uninterrupted)
    finally:
        subprocess.run(["umount", "--lazy", run.checkpoints], check=True, timeout=300)


def test_wandb_is_offline_inside_the_run_and_never_in_the_way(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb", reason="tracking needs wandb: the train extra")
    spec = {"train": {"steps": 2, "eval_every_steps": None}, "tracking": {"mode": "offline"}}
    run = make_run("one", **spec)
    live(run, 1, stop_after=1)
    live(run, 2)
    folders = sorted(path.name for path in (run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(name.endswith("-the-run") for name in folders), "one id in every life"
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no service today")))
    assert live(make_run("two", **spec), 1).startswith("trained 2 steps")
    assert "no service today" in capsys.readouterr().out


def test_order_is_epoch_by_epoch_and_depends_on_the_seed_alone() -> None:
    order = list(Order(10, 25, seed=4))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and len(order) == 25
    assert order[:10] != order[10:20] and order == list(Order(10, 25, seed=4)) != list(Order(10, 25, seed=5))
    assert list(Order(10, 12, seed=4)) == order[:12]


def test_epochs_become_steps(make_run: MakeRun) -> None:
    spec = make_run(train={"steps": None, "epochs": 1.5}).spec()
    assert spec.train.total_steps(rows=10) == 4  # 15 rows, 4 at a time
