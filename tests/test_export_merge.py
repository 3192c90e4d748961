"""The merge, tensor by tensor: to the bit what peft makes of the whole model, in a fraction of the memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="export needs torch: the train extra")
transformers = pytest.importorskip("transformers", reason="export needs transformers: the train extra")
pytest.importorskip("bitsandbytes", reason="export needs bitsandbytes: the train extra")

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.methods import METHODS, make_run  # noqa: E402
from ftlib.errors import FtError, InputError  # noqa: E402
from ftlib.export.base import BaseTensors  # noqa: E402
from ftlib.export.merge import MergedTensors  # noqa: E402
from ftlib.export.weights import write_merged  # noqa: E402
from ftlib.rundir import RunDir  # noqa: E402
from ftlib.spec import RunSpec  # noqa: E402
from ftlib.train import methods, quantised  # noqa: E402
from ftlib.train.model import load_base  # noqa: E402

CPU = torch.device("cpu")
MERGED = [name for name in METHODS if not name.startswith("prompt")]
SMALL = "train.steps=2 train.global_batch=2 train.micro_batch=2 tracking.mode=disabled evaluate.pairs=4 data.pairs=40 "


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


def at_once(spec: RunSpec, model_path: str, trained: Path, folder: Path, dtype: Any = torch.float32) -> None:
    """The merge as it would be with memory for the whole model in fp32: dequantized, merged by peft, saved.
    dtype: what the training computed in."""
    if spec.method.adapts:
        base: Any = load_base(spec, model_path, CPU, dtype=dtype)
        if spec.method.bits < 16:
            base = base.dequantize(torch.float32)
        model: Any = PeftModel.from_pretrained(base.float(), str(trained)).merge_and_unload(safe_merge=True)
    else:
        model = methods.load_trained(spec, model_path, CPU, trained, dtype=dtype)
    model = model.to(getattr(torch, spec.export.dtype))
    model.config.use_cache = True
    model.save_pretrained(str(folder))


def with_dtype(spec: RunSpec, dtype: str) -> RunSpec:
    return spec.model_copy(update={"export": spec.export.model_copy(update={"dtype": dtype})})


def checkpoint_of(run: RunDir, folder: Path) -> Path:
    """What a checkpoint of the run would hold, drawn at random: no adapter without effect, no equal weights."""
    spec, path = run.spec(), str(run.provenance()["model_path"])
    model = methods.attach(load_base(spec, path, CPU), spec, path)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    methods.save(model, folder)
    return folder


@pytest.mark.parametrize("name", MERGED)
def test_every_method_merges_to_the_bits_that_the_whole_model_would(name: str, root: Path) -> None:
    recipe, settings = METHODS[name]
    run = make_run(root / name / "a-run", root / "cache", recipe, SMALL + settings)
    trained = checkpoint_of(run, root / name / "checkpoint")
    path = str(run.provenance()["model_path"])
    for computed, dtype in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        spec, trained_in = with_dtype(run.spec(), dtype), getattr(torch, computed)
        ours, theirs = (root / name / f"{whose}-{computed}-{dtype}" for whose in ("ours", "theirs"))
        write_merged(spec, path, CPU, trained, ours, dtype=trained_in)
        at_once(spec, path, trained, theirs, trained_in)
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        for file in ("config.json", "generation_config.json"):
            assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text()), file


TIED = {"tied": True, "untied": False}


@pytest.mark.parametrize("kind", TIED)
def test_new_tokens_of_tied_and_untied_heads(kind: str, root: Path) -> None:
    """Rows of new tokens are resized, drawn and merged as in the whole model."""
    base = root / f"base {kind}"
    tiny = Path("models/tiny-llama3")
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=TIED[kind])
    transformers.set_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, base / file)
    settings = METHODS["qlora, new tokens"][1] + f" model.name='{base}'"
    run = make_run(root / f"tokens {kind}" / "a-run", root / "cache", "tiny-llama3", SMALL + settings)
    trained, spec, path = checkpoint_of(run, root / f"tokens {kind}" / "checkpoint"), run.spec(), str(base)
    ours, theirs = (root / f"tokens {kind}" / name for name in ("ours", "theirs"))
    write_merged(spec, path, CPU, trained, ours)
    at_once(spec, path, trained, theirs)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert ("lm_head.weight" in load_file(ours / "model.safetensors")) is not TIED[kind]


def in_shards(folder: Path, base: Path, dtype: Any) -> Path:
    """The model in `base` as files of `dtype`, in several shards."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, folder / file)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=["in float32", "in bfloat16"])
@pytest.mark.parametrize("kept", [False, True], ids=["original files", "kept by training"])
def test_the_base_is_the_one_that_was_trained_on(
    kept: bool, computed: Any, dtype: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16-bit files in shards, and from 4-bit weights that training kept: what training's base dequantizes to."""
    monkeypatch.setattr(quantised, "PAYS_FROM_BYTES", 0 if kept else 1 << 40)
    base = in_shards(tmp_path / "base", Path("models/tiny-llama3"), getattr(torch, dtype))
    run = make_run(tmp_path / "a-run", root / "cache", "tiny-llama3", f"{SMALL} model.name='{base}' method.kind=qlora "
                   "method.train_layers=[]")  # fmt: skip
    spec, cache = run.spec(), tmp_path / "cache"
    want = load_base(spec, str(base), CPU, cache, dtype=computed).dequantize(torch.float32)
    monkeypatch.setattr(quantised, "keep", lambda *_: pytest.fail("export keeps nothing"))
    tensors = BaseTensors(spec, str(base), CPU, cache, computed)
    assert tensors.source.was_kept is kept
    own = dict(want.named_parameters())
    assert own.keys() == tensors.shapes.keys()
    for name in tensors.shapes:
        tensor = tensors.take(name)
        assert torch.equal(tensor.float(), own[name].float()) and tensor.shape == tensors.shapes[name], name


def test_the_loader_works_as_it_is_used_here() -> None:
    """ftlib/export/base.py keeps from_pretrained from reading weights, and calls its loader itself: an upgrade of
    transformers or peft that changes either fails here."""
    from inspect import signature

    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel
    from transformers.core_model_loading import convert_and_load_state_dict_in_model, rename_source_key

    loader = signature(PreTrainedModel._load_pretrained_model).parameters
    assert list(loader) == ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
    assert len(signature(PreTrainedModel._finalize_model_loading).parameters) == 3
    first = list(signature(convert_and_load_state_dict_in_model).parameters)[:3]
    assert first == ["model", "state_dict", "load_config"]
    assert list(signature(rename_source_key).parameters)[:5] == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert hasattr(BaseTunerLayer, "_move_adapter_to_device_of_base_layer")


def test_a_tensor_that_no_file_holds_and_a_broken_adapter_are_refused(root: Path, tmp_path: Path) -> None:
    base = in_shards(tmp_path / "base", Path("models/tiny-llama3"), torch.float32)
    settings = f"{SMALL} model.name='{base}' method.kind=lora method.train_layers=[]"
    run = make_run(tmp_path / "a-run", root / "cache", "tiny-llama3", settings)
    spec, trained = run.spec(), checkpoint_of(run, tmp_path / "checkpoint")
    file = trained / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file, metadata={"format": "pt"})
    tensors = MergedTensors(spec, str(base), CPU, trained)
    with pytest.raises(FtError, match=r"the adapter makes infinite numbers or NaN of it"):
        for tensor in tensors.shapes:
            tensors.take(tensor)
    save_file({**weights, "base_model.model.odd.lora_A.weight": weights[name].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(FtError, match="the adapter does not fit the base"):
        MergedTensors(spec, str(base), CPU, trained)

    index = base / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = values["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(values))
    left = {key: tensor for key, tensor in load_file(base / shard).items() if key != "model.norm.weight"}
    save_file(left, base / shard, metadata={"format": "pt"})
    with pytest.raises(FtError, match=r"no file holds 1 of the base's tensors, such as model\.norm\.weight"):
        BaseTensors(spec, str(base), CPU, None)
    with pytest.raises(InputError, match=r"model\.name"):
        BaseTensors(spec, str(tmp_path / "nowhere"), CPU, None)


MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from ftlib.export import shards, weights
from ftlib.rundir import RunDir

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
run, trained, folder = RunDir(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
shards.SHARD_BYTES = int(sys.argv[4])
warm = torch.nn.Linear(512, 512)(torch.ones(2, 512)).sum().backward()
spec, path = run.spec(), str(run.provenance()["model_path"])
weights.MergedTensors(spec, path, torch.device("cpu"), trained).take("model.norm.weight")
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
weights.write_merged(spec, path, torch.device("cpu"), trained, folder)
done = True
watcher.join()
print(before, peak)
"""


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("kind=qlora", 8), *(pytest.param(kind, 24, marks=pytest.mark.nightly)
                          for kind in ("kind=qlora", "kind=lora method.dora=true", "kind=lora method.base_bits=8"))],
)  # fmt: skip
def test_the_memory_of_a_merge_does_not_grow_with_the_model(
    kind: str, layers: int, tmp_path: Path, root: Path
) -> None:
    """Anonymous memory: the interpreter and the adapter, one shard, four fp32 copies of the largest tensor. The whole
    model in fp32 would be several times that."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("models/tiny-llama3") / file, base / file)
    settings = f"{SMALL} model.name='{base}' method.{kind} method.train_layers=[] method.rank=4"
    run = make_run(tmp_path / "a-run", root / "cache", "tiny-llama3", settings)
    trained = checkpoint_of(run, tmp_path / "checkpoint")
    largest, shard = 4 * 512 * 1024, 8_000_000
    parameters = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    # glibc returns a freed block above this size at once. Without it the limit follows the blocks, up to 32 MiB: the
    # tensors of a model with billions of parameters are above that, this one's are below.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(run.path), str(trained), str(tmp_path / "merged"), str(shard)],
        env=environment, capture_output=True, text=True, timeout=300, check=True)
    before, peak = map(int, done.stdout.split()[-2:])
    # What the interpreter itself still loads while it merges; of a real model that is a thousandth.
    loaded_late = 4 << 20
    allowed = shard + 4 * largest + (trained / "adapter_model.safetensors").stat().st_size + loaded_late
    print(f"{(peak - before) / 2**20:.1f} MiB, of {allowed / 2**20:.1f} allowed")
    assert 4 * parameters > 3 * allowed
    assert peak - before < allowed, f"{(peak - before) / 2**20:.0f} MiB of {allowed / 2**20:.0f}"
