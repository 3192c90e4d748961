"""Evaluation: scores, answers, perplexity, going on after an interruption, and what a person reads of it."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ftlib import atomic
from ftlib.errors import InputError, Interrupted
from ftlib.evaluate.scoring import copies, scores
from ftlib.report.cost import stage_costs
from ftlib.report.page import evaluation_table
from ftlib.rundir import RunDir
from ftlib.runs import act, events, outcome
from ftlib.runs.decide import Requeue
from ftlib.runs.ledger import Ledger
from ftlib.runs.scheduler import Here
from ftlib.slurm.investigate import investigator
from ftlib.stop import StopFlag
from jobs.local import NoController
from tests.tiny_llama import write_model, write_run

CALL = {"name": "f", "arguments": {"n": 100, "on": True}}
SCORES = ("valid_json", "function", "exact")
JSON = json.dumps({"function_call": CALL})


def answer(text: str | None, nll: float = 0.0, tokens: int = 0) -> dict[str, Any]:
    return {"answer": text, "nll": nll, "tokens": tokens}


@pytest.mark.parametrize(
    ("text", "valid", "function", "exact"),
    [
        (JSON, 1, 1, 1),
        (f" {JSON}\n", 1, 1, 1),
        ('{"function_call": {"arguments": {"on": true, "n": 100}, "name": "f"}}', 1, 1, 1),
        (JSON.replace("100", "100.0"), 1, 1, 0),
        (JSON.replace("100", '"100"'), 1, 1, 0),
        (JSON.replace("true", "1"), 1, 1, 0),
        (JSON.replace('"f"', '"g"'), 1, 0, 0),
        (json.dumps(CALL), 1, 0, 0),
        ("[1]", 0, 0, 0),
        (JSON + " and more", 0, 0, 0),
        (JSON + "}", 0, 0, 0),
        (JSON[:-1], 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_an_answer_is_right_only_when_it_is_the_call_and_nothing_else(
    text: str, valid: int, function: int, exact: int
) -> None:
    found = scores([{"expected_call": CALL}], [answer(text)])
    assert [found[key] for key in SCORES] == [valid, function, exact]


def test_shares_and_perplexity_are_over_all_questions() -> None:
    found = scores([{"expected_call": CALL}] * 3, [answer(JSON, 3.0, 2), answer("no", 1.0, 1), answer("{}", 2.0, 3)])
    assert found == {
        "valid_json": 0.6667, "function": 0.3333, "exact": 0.3333, "perplexity": round(math.e, 4), "n": 3
    }  # fmt: skip
    assert scores([{"expected_call": CALL}], [answer("", 1e6, 1)])["perplexity"] is None


def test_other_kinds_of_data_have_a_perplexity_alone() -> None:
    question = {"expected_call": None, "example_call": None}
    assert scores([question], [answer("text", 2.0, 2)]) == dict.fromkeys(SCORES) | {"perplexity": 2.7183, "n": 1}
    assert scores([question], copies([question])) == dict.fromkeys(SCORES) | {"perplexity": None, "n": 1}


def test_copying_the_example_is_a_valid_answer() -> None:
    question = {"expected_call": CALL, "example_call": {**CALL, "arguments": {"n": 3, "on": True}}}
    assert [scores([question], copies([question]))[key] for key in SCORES] == [1, 1, 0]


def test_the_table_is_whole_in_a_log_of_a_hundred_columns() -> None:
    row = {"valid_json": 1.0, "function": 0.987, "exact": None, "perplexity": 123456.0, "n": 256}
    models = {"base": row, "tuned": row, "copy": {**row, "perplexity": None}}
    text = io.StringIO()
    Console(file=text, width=100).print(evaluation_table({**models, "unseen": models}))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100 and "…" not in text.getvalue()
    assert sum("98.7%" in line for line in lines) == 6
    assert any("unseen functions" in line and "base" in line for line in lines)


def test_costs_count_every_life_of_a_stage_also_one_that_was_killed() -> None:
    def started(stage: str, attempt: int, minute: int) -> events.Event:
        return events.Started(stage=stage, attempt=attempt, job_id="1", time=60.0 * minute)

    seen = Ledger(
        events=(
            events.Submitted(stage="train", job_id="1", time=0.0),
            started("train", 1, 10),
            events.CheckpointSaved(stage="train", attempt=1, step=5, time=60.0 * 14),
            started("train", 2, 20),
            events.Ended(stage="train", attempt=2, code=75, time=60.0 * 25),
            started("train", 3, 30),
            events.Ended(stage="train", attempt=3, code=0, time=60.0 * 31),
            started("evaluate", 1, 40),
        )
    )
    plan = {"stages": {"train": {"device": "cuda", "nodes": 2, "gpus_per_node": 3}}}
    train, evaluate = stage_costs(seen, plan, now=60.0 * 42)
    assert (train.stage, train.lives, train.seconds, train.gpu_hours) == ("train", 3, 600, 1.0)
    assert (evaluate.lives, evaluate.seconds, evaluate.gpu_hours) == (1, 120, 0)


# From here on a model answers.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and tuned/: another model with the same tokenizer."""
    pytest.importorskip("torch", reason="models need torch: the train extra")
    pytest.importorskip("transformers", reason="models need transformers: the train extra")
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "base")
    write_model(folder / "tuned", seed=1)
    return folder


def exported(folder: Path, models: Path, data: Path | None = None, **changes: Any) -> RunDir:
    """A run whose data is prepared and whose export is models/tuned."""
    from ftlib.data.prepare import prepare

    changes = {"data__pairs": 20, "data__seq_len": 256, "evaluate__pairs": 10, "evaluate__max_new_tokens": 8} | changes
    run = write_run(folder, models / "base", data, **changes)
    prepare(run, StopFlag())
    shutil.copytree(models / "tuned", run.export / "merged")
    return run


def test_the_stage_scores_both_models_and_writes_the_report(
    odd_dir: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import stage

    run = exported(odd_dir / "run", models)
    run.record(events.Started(stage="evaluate", attempt=1, job_id="1"), writer="evaluate-1")
    words = stage.evaluate(run, 1, StopFlag())
    evaluation = json.loads(run.evaluation_file.read_text())
    assert list(evaluation) == ["base", "tuned", "copy", "unseen"]
    assert list(evaluation["unseen"]) == ["base", "tuned", "copy"]
    for group, pairs in ((evaluation, 10), (evaluation["unseen"], 64)):
        for name in ("base", "tuned", "copy"):
            assert list(group[name]) == [*SCORES, "perplexity", "n"] and group[name]["n"] == pairs
        assert [group["copy"][key] for key in (*SCORES, "perplexity")] == [1, 1, 0, None]
        assert group["base"]["perplexity"] != group["tuned"]["perplexity"]
    assert "on 10 held-out pairs" in words and "unseen functions" in capsys.readouterr().out
    report = run.report_file.read_text()
    for expected in (
        "| held-out pairs | copy | 100.0% | 100.0% | 0.0% | - | 10 |",
        "### Sample 3: wrong",
        "| evaluate | 1 | ",
        "make submit MODEL=tiny SET='data.limit=3 tracking.project='\"'\"'a b'\"'\"'' NEW=1",
        "git checkout 0123abc",
        f"digest {run.prepared()['digest']}",
        f"AutoModelForCausalLM.from_pretrained({str(run.export / 'merged')!r})",
    ):
        assert expected in report


def test_batched_answers_and_perplexity_are_those_of_each_question_alone(models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlib.data import tokenizing
    from ftlib.evaluate import answering

    prompts = ["user: Convert 100 USD to EUR\ncall: ", "user: hi\n", 'example: {"name":"f"}\nuser: What is 3?\ncall: ']
    responses = ['{"function_call":{}}', "12", '{"a":"ä ⚠"} and more']
    model = answering.load(str(models / "base"), device="cpu", dtype="float16")
    tokenizer = tokenizing.load(str(models / "base"))
    answerer = answering.Answerer(model, tokenizer, max_new_tokens=12, stop=StopFlag())
    plain, plain_tokenizer = (
        AutoModelForCausalLM.from_pretrained(models / "base"),
        AutoTokenizer.from_pretrained(models / "base"),
    )
    texts, nll = answerer.answers(prompts), answerer.nll(prompts, responses)
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        asked = plain_tokenizer(prompt, return_tensors="pt")
        found = plain.generate(**asked, do_sample=False, max_new_tokens=12)[0, asked.input_ids.shape[1] :]
        assert texts[number] == plain_tokenizer.decode(found, skip_special_tokens=True)
        tail = plain_tokenizer(response + "</s>", return_tensors="pt").input_ids
        ids = torch.cat([asked.input_ids, tail], dim=1)
        labels = ids.clone()
        labels[:, : asked.input_ids.shape[1]] = -100
        expected = plain(input_ids=ids, labels=labels).loss.item() * tail.shape[1]
        assert nll[number] == (pytest.approx(expected, rel=1e-4), tail.shape[1])


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.evaluate import answering
    from ftlib.evaluate.evaluate import evaluate

    batches: list[int] = []
    plain, stop = answering.Answerer.answers, StopFlag()
    stop_at: list[int] = []

    def watched(self: Any, prompts: list[str]) -> list[str]:
        batches.append(len(prompts))
        if len(batches) in stop_at:
            # In the middle of a generation.
            stop.cause = "preemption"
        return plain(self, prompts)

    monkeypatch.setattr(answering.Answerer, "answers", watched)
    whole = exported(tmp_path / "whole", models, evaluate__batch=32)
    evaluation = evaluate(whole, StopFlag())
    assert batches == [32, 32, 10] * 2
    run = exported(tmp_path / "cut", models, evaluate__batch=32)
    # The second model's first batch.
    stop_at.append(len(batches) + 4)
    with pytest.raises(Interrupted, match="preemption"):
        evaluate(run, stop)
    assert not run.evaluation_file.exists()
    # A crash may also leave a line cut short.
    with (run.path / "evaluation" / "base.jsonl").open("a") as file:
        file.write('{"index": 3, "ans')
    batches.clear()
    assert evaluate(run, StopFlag()) == evaluation
    assert batches == [32, 32, 10]
    for name in ("base", "tuned"):
        lines = (run.path / "evaluation" / f"{name}.jsonl").read_text().split("\n")
        assert len([line for line in lines if line.endswith("}")]) == 74


def test_preemptions_of_an_evaluation_that_keeps_its_answers_never_stop_the_run(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.evaluate import answering
    from ftlib.evaluate.evaluate import evaluate, read_answers

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = exported(tmp_path / "run", models, evaluate__batch=4)
    run.lives.mkdir(exist_ok=True)
    plain, stop = answering.Answerer.nll, StopFlag()

    def stopped_after_a_batch(self: Any, *texts: list[str]) -> list[tuple[float, int]]:
        stop.cause = "preemption"
        return plain(self, *texts)

    monkeypatch.setattr(answering.Answerer, "nll", stopped_after_a_batch)
    for attempt in range(1, 12):
        stop.cause = None
        (run.lives / f"evaluate-{attempt}").write_text("1 local 0\n")
        with pytest.raises(Interrupted):
            evaluate(run, stop, attempt=attempt)
        outcome.write(run.outcomes, outcome.Outcome("evaluate", attempt, 75, "interrupted (preemption)"))
        here = Here(job_id="1", stage="evaluate", attempt=attempt, ended=True)
        investigate = investigator(run.path, code=75, job_id="1", slurm=False)
        decided = act.end_attempt(run, NoController(), here, investigate)
        assert isinstance(decided, Requeue), f"attempt {attempt}: {decided.message}"
    assert len(read_answers(run.path / "evaluation" / "base.jsonl")) == 44


def test_an_adapter_alone_is_evaluated_over_its_base(tmp_path: Path, models: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft: the train extra")
    from transformers import AutoModelForCausalLM

    from ftlib.evaluate.evaluate import evaluate

    run = exported(tmp_path / "run", models, export__merged=False)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models / "base"), config)
    adapted.save_pretrained(run.export / "adapter")
    merged = exported(tmp_path / "merged", models)
    adapted.merge_and_unload().save_pretrained(merged.export / "merged")
    by_adapter, by_merged = evaluate(run, StopFlag()), evaluate(merged, StopFlag())
    assert by_adapter["base"] == by_merged["base"]
    assert by_adapter["tuned"]["perplexity"] == pytest.approx(by_merged["tuned"]["perplexity"], rel=1e-3)
    assert by_adapter["tuned"]["perplexity"] != by_adapter["base"]["perplexity"]


def test_data_without_calls_is_judged_by_perplexity_and_shown_in_samples(tmp_path: Path, models: Path) -> None:
    from jobs import stage

    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"Name {n}.", "output": f"It is {n}."}) for n in range(300)))
    run = exported(tmp_path / "run", models, path)
    stage.evaluate(run, 1, StopFlag())
    evaluation = json.loads(run.evaluation_file.read_text())
    assert list(evaluation) == ["base", "tuned", "copy"]
    assert [evaluation["tuned"][key] for key in SCORES] == [None] * 3 and evaluation["tuned"]["perplexity"] > 1
    assert evaluation["copy"]["perplexity"] is None
    assert run.report_file.read_text().count("### Sample") == 3 and "wrong" not in run.report_file.read_text()


def test_a_missing_export_is_said_in_words(tmp_path: Path, models: Path) -> None:
    from ftlib.evaluate.evaluate import evaluate

    run = exported(tmp_path / "run", models)
    atomic.discard_folder(run.export / "merged")
    with pytest.raises(InputError, match=r"merged: is not there\. Was the export stage completed"):
        evaluate(run, StopFlag())
