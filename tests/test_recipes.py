"""The recipes of large models carry what they promise, fit where they say, and each has a twin of the same method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib import recipe
from ftlib.data import sources
from ftlib.errors import InputError
from ftlib.plan import architectures, memory, shapes
from ftlib.spec import RunSpec
from tests.tiny_models import TWINS, config, write_model
from tests.wishes import CHECKOUT, RECIPES, jobs, spec

TWIN_OF = {
    "codellama-13b": "tiny-codellama",
    "llama-7b-alpaca": "tiny-alpaca",
    "llama3-8b": "tiny-llama3",
    "falcon-7b": "tiny-falcon",
    "llama2-7b-full": "tiny-zero2",
    "llama2-70b-zero3": "tiny-zero3",
}
# Parameters as the models' cards count them.
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "codellama/CodeLlama-13b-hf": 13_016_028_160,
    "huggyllama/llama-7b": 6_738_415_616,
    "tiiuae/falcon-7b": 6_921_720_704,
}


def shape_of(wish: RunSpec) -> shapes.ModelShape:
    return shapes.from_config(shapes.KNOWN[wish.model.name], wish.model.name)


def test_codellama_is_qlora_in_chatml_with_its_own_hyperparameters() -> None:
    wish = spec("codellama-13b")
    assert (wish.data.template, wish.method.kind, wish.method.double_quant) == ("chatml", "qlora", True)
    assert wish.train.micro_batch and wish.train.global_batch // wish.train.micro_batch == 4
    assert (wish.train.log_every_steps, wish.optim.lr, wish.optim.schedule) == (5, 5e-4, "cosine")
    needed = memory.training(shape_of(wish), wish, wish.train.micro_batch).total_gib
    assert 6 < needed < 32e9 / 2**30


def test_llama_alpaca_trains_on_a_hundredth_with_both_prompts() -> None:
    wish = spec("llama-7b-alpaca")
    assert (wish.data.hub, wish.data.share, wish.data.template) == ("yahma/alpaca-cleaned", 0.01, "alpaca")
    assert (wish.method.kind, wish.method.bits, wish.model.name) == ("lora", 8, "huggyllama/llama-7b")
    assert shape_of(wish).lora_params(wish.method.rank, wish.method.targets) == 4_194_304


def test_llama3_is_in_16_bit_with_its_last_blocks_trained_on_all_of_alpaca() -> None:
    wish = spec("llama3-8b")
    assert (wish.method.kind, wish.method.bits) == ("freeze", 16)
    chosen = architectures.select(wish.method.train_layers, [name for p in LLAMA3 for name in p.names])
    assert len(chosen) == 4 * 9 and all(28 <= int(name.split(".")[2]) <= 31 for name in chosen)
    assert (wish.data.hub, wish.data.share) == ("yahma/alpaca-cleaned", None)


def test_falcon_is_qlora_nf4_on_the_best_conversations() -> None:
    wish = spec("falcon-7b")
    assert (wish.data.hub, wish.data.template) == ("OpenAssistant/oasst1", "guanaco")
    assert (wish.method.kind, wish.method.quant_type, wish.method.double_quant) == ("qlora", "nf4", True)
    assert (wish.optim.name, wish.optim.lr, wish.train.steps) == ("paged_adamw_32bit", 2e-4, 200)


@pytest.mark.parametrize(("large", "tiny"), TWIN_OF.items())
def test_a_twin_has_the_architecture_and_the_method_of_its_model(large: str, tiny: str) -> None:
    big, small = spec(large), spec(tiny)
    found = config(Path(small.model.name).name)
    assert small.model.name == TWINS[large]
    assert found["model_type"] == shapes.KNOWN[big.model.name]["model_type"]
    same = {"kind", "base_bits", "quant_type", "double_quant", "targets", "dropout"}
    assert small.method.model_dump(include=same) == big.method.model_dump(include=same)
    assert small.data.template == big.data.template and small.zero == big.zero
    assert (small.optim.name, small.optim.schedule) == (big.optim.name, big.optim.schedule)


@pytest.mark.parametrize("name", recipe.names(RECIPES))
def test_every_recipe_names_data_and_layers_that_are_there(name: str) -> None:
    wish = spec(name)
    folder = CHECKOUT / wish.model.name
    known = json.loads((folder / "config.json").read_text()) if folder.is_dir() else shapes.KNOWN[wish.model.name]
    found = architectures.parameters(known, wish.model.name)
    targets = wish.method.targets
    assert isinstance(targets, str) or not architectures.target_problems("method.targets", targets, found)
    assert not architectures.pattern_problems("method.train_layers", wish.method.train_layers, found)
    if wish.data.path:
        assert sources.check_file(CHECKOUT / wish.data.path, wish.data).rows > 25


def test_the_samples_are_what_their_script_makes(tmp_path: Path) -> None:
    script = tmp_path / "make_samples.py"
    script.write_text((CHECKOUT / "samples" / "make_samples.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    for made in tmp_path.glob("*.jsonl"):
        assert made.read_bytes() == (CHECKOUT / "samples" / made.name).read_bytes()


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_their_published_number_of_parameters(name: str) -> None:
    shape = shapes.from_config(shapes.KNOWN[name], name)
    found = architectures.parameters(shapes.KNOWN[name], name)
    assert shape.params == PARAMETERS[name] == sum(p.size * p.copies for p in found)


def test_falcons_blocks_share_one_key_and_value_and_have_no_gate() -> None:
    shape = shapes.from_config(shapes.KNOWN["tiiuae/falcon-7b"], "falcon")
    assert [p.shape[::-1] for p in shape.linears] == [(4544, 4672), (4544, 4544), (4544, 18176), (18176, 4544)]
    assert shape.tied and shape.embedding_params == 65024 * 4544
    llama3 = shapes.from_config(shapes.KNOWN["meta-llama/Meta-Llama-3-8B"], "llama3")
    assert [p.shape for p in llama3.linears[:4]] == [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-base", {}),
        ("tiny-base", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("tiny-llama3", {"head_dim": 32}),
        ("tiny-falcon", {}),
        ("tiny-falcon", {"multi_query": False, "bias": True, "tie_word_embeddings": False}),
        ("tiny-falcon", {"parallel_attn": False}),
        ("tiny-falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("tiny-falcon", {"ffn_hidden_size": 96}),
    ],
)
def test_the_table_has_exactly_the_names_and_shapes_of_a_saved_model(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch", reason="building a model needs torch: the train extra")
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, name, **changes)
    saved = json.loads((tmp_path / "config.json").read_text())
    found = architectures.parameters(saved, name)
    with torch.device("meta"):
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = {full: tuple(parameter.shape) for full, parameter in model.named_parameters()}
    assert {full: parameter.shape for parameter in found for full in parameter.names} == theirs
    assert shapes.from_config(saved, name).params == sum(parameter.numel() for parameter in model.parameters())


FALCON = architectures.parameters(shapes.KNOWN["tiiuae/falcon-7b"], "falcon")
LLAMA3 = architectures.parameters(shapes.KNOWN["meta-llama/Meta-Llama-3-8B"], "llama3")


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["28-31"], 4 * 9),
        (["layers.31"], 9),
        (["layers.31", "31.mlp", "lm_head"], 9 + 1),
        (["30-31.self_attn.[qv]_proj"], 4),
        (["*_proj"], 32 * 7),
        (["norm"], 1),
        (["model"], 32 * 9 + 2),
    ],
)
def test_patterns_select_parameters_by_name_and_by_range(patterns: list[str], count: int) -> None:
    names = [name for parameter in LLAMA3 for name in parameter.names]
    assert len(architectures.select(patterns, names)) == count
    assert not architectures.pattern_problems("method.layers", patterns, LLAMA3)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("layers.31", ["layers is no part of any", "transformer"]),
        ("h.32", ["blocks are 0-31"]),
        ("30-40.mlp", []),
        ("query_key_vale", ["Did you mean query_key_value?"]),
        ("h.3.mlpp", ["mlpp is no part of any", "Did you mean h.3.mlp?"]),
        ("lm_head", ["lm_head is no part of any"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_would(pattern: str, said: list[str]) -> None:
    problems = architectures.pattern_problems("method.layers", [pattern], FALCON)
    assert len(problems) == bool(said) and all(words in problems[0] for words in said)


def test_an_adapters_target_must_be_a_linear_layer() -> None:
    assert not architectures.target_problems(
        "method.targets", ["dense", "self_attention.dense", "mlp.dense_4h_to_h"], FALCON
    )
    (problem,) = architectures.target_problems("method.targets", ["q_proj"], FALCON)
    assert "'q_proj' is unknown. Allowed: dense, dense_4h_to_h, dense_h_to_4h, query_key_value" in problem
    assert "Did you mean q_proj?" in architectures.target_problems("method.targets", ["q_prj"], LLAMA3)[0]


def test_an_unknown_architecture_and_a_config_without_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"model_type: 'lama' is unknown.*Did you mean llama\?"):
        architectures.parameters({"model_type": "lama"}, "mine")
    with pytest.raises(InputError, match="without hidden_size, num_attention_heads, vocab_size, intermediate_size"):
        shapes.from_config({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": "many"}, "mine")


def test_layers_are_printed_without_weights_or_torch() -> None:
    done = jobs("layers", "--model", "falcon-7b", "--cluster", "a100")
    assert done.returncode == 0, done.stderr
    assert "transformer.h.0-31.self_attention.query_key_value.weight" in done.stdout and "4672 × 4544" in done.stdout
    assert "6,921,720,704" in done.stdout and "dense_4h_to_h" in done.stdout
    made = json.loads(jobs("layers", "--model", "tiny-llama3", "--cluster", "local", "--json").stdout)
    assert {row["name"]: row["copies"] for row in made["parameters"]}["model.layers.0-1.self_attn.k_proj.weight"] == 2
    wrong = jobs("layers", "--model", "falcon")
    assert wrong.returncode == 64 and "Did you mean falcon-7b?" in wrong.stderr
    heavy = {"torch", "transformers", "datasets", "peft", "numpy"}
    code = (
        f"import sys; from jobs.cli import main; main(['layers', '--cluster', 'local']); "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=120
    )
    assert alone.stdout.splitlines()[-1] == "[]"
