"""report.md: how good the run's model is, what it cost, how to get it again, where it lies and how to load it."""

import contextlib
import importlib.metadata
import json
import platform
import shlex
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ftlib import atomic
from ftlib.report.cost import stage_costs
from ftlib.report.plan import minutes
from ftlib.rundir import RunDir

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")
SHARES = (("valid_json", "valid JSON"), ("function", "right function"), ("exact", "exact arguments"))
HEADS = ("asked on", "model", *(words for _, words in SHARES), "perplexity", "pairs")
GROUP_WORDS = {"held-out": "held-out pairs", "unseen": "unseen functions"}


def write_report(run: RunDir) -> Path:
    """Write the report of an evaluated run to `run.report_file`, which is returned."""
    sections = [_title(run), _quality(run), _cost(run), _again(run), _files(run)]
    atomic.write_text(run.report_file, "\n\n".join(sections) + "\n")
    return run.report_file


def _title(run: RunDir) -> str:
    spec, train = run.spec(), run.spec().train
    length = f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs"
    return f"# {run.name}\n\n{spec.description}".rstrip() + (
        f"\n\n{spec.method.kind} of `{spec.model.name}`: rank {spec.method.rank}, learning rate {spec.optim.lr:g}, "
        f"{length}, {spec.train.global_batch} rows of {spec.data.seq_len} tokens a step.")


def _quality(run: RunDir) -> str:
    evaluation = json.loads(run.evaluation_file.read_text(encoding="utf-8"))
    lines = [_row(HEADS), _row(["---", "---", *["---:"] * (len(HEADS) - 2)])]
    lines += [_row([GROUP_WORDS[group], name, *cells]) for group, name, cells in evaluation_rows(evaluation)]
    words = (
        "`base` is the model before tuning, `tuned` after, `copy` answers with the example in the prompt. "
        "Unseen functions are in no training. Perplexity is of the right response, a token.")
    return "\n\n".join(["## How good it is", "\n".join(lines), words, *_samples(run)])


def _samples(run: RunDir) -> list[str]:
    file = run.path / "evaluation" / "samples.json"
    samples = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    shown = []
    for number, sample in enumerate(samples, start=1):
        verdict = {True: ": right", False: ": wrong", None: ""}[sample["exact"]]
        parts = [("prompt", "prompt"), ("expected", "response"), ("tuned", "tuned"), ("base", "base")]
        # Indented blocks, whatever is in them.
        texts = [f"{title}\n\n{textwrap.indent(sample.get(key) or '(nothing)', '    ', bool)}" for title, key in parts]
        shown.append("\n\n".join([f"### Sample {number}{verdict}", *texts]))
    return shown


def _cost(run: RunDir) -> str:
    known = run.ledger()
    plan = run.plan()
    costs = stage_costs(known, plan, time.time())
    lines = [_row(["stage", "lives", "wall time", "lost", "GPU-hours"]), _row(["---", *["---:"] * 4])]
    names = [cost.stage for cost in costs]
    figures = [[c.lives, c.seconds, c.lost_seconds, c.gpu_hours] for c in costs]
    sums = [sum(row[column] for row in figures) for column in range(4)]
    for name, (lives, seconds, lost, gpu_hours) in zip([*names, "all"], [*figures, sums], strict=True):
        lines.append(_row([name, str(lives), minutes(seconds / 60), minutes(lost / 60), f"{gpu_hours:.2f}"]))
    return "## What it cost\n\n" + "\n".join(lines) + f"\n\nOn cluster `{plan.get('cluster', '?')}`, without queueing."


def _again(run: RunDir) -> str:
    provenance, prepared = run.provenance(), run.prepared()
    code = provenance.get("code") or {}
    commit = code.get("commit")
    words = provenance.get("said") or {"MODEL": run.spec().recipe}
    submit = f"make submit {' '.join(f'{name}={shlex.quote(value)}' for name, value in words.items())} NEW=1"
    commands = [f"git checkout {commit}"] if commit else []
    changed = f"The checkout had changes that are in no commit; what ran is in `{run.code}`.\n\n"
    changed = changed if code.get("changed") else ""
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    facts = {
        "code": commit or f"no commit; what ran is in {run.code}",
        "data": f"{provenance.get('data_path') or 'the generator'}, digest {provenance.get('data_digest')}",
        "dataset": f"digest {prepared['digest']}", "model": str(provenance.get("model_path")),
        "versions": ", ".join(versions)}
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"## How to get it again\n\n{_code('sh', [*commands, submit])}\n\n{changed}{listed}"


def _files(run: RunDir) -> str:
    spec, prepared = run.spec(), run.prepared()
    merged, adapter = run.export / "merged", run.export / "adapter"
    places = {
        "merged weights": merged if spec.export.merged else None, "adapter": adapter if adapter.exists() else None,
        "checkpoints": run.checkpoints, "loss of every step": run.metrics_file, "scores": run.evaluation_file,
        "every answer": run.path / "evaluation", "packed dataset": prepared["dataset"]}
    listed = "\n".join(f"- {name}: `{place}`" for name, place in places.items() if place)
    model, tokenizer, auto = merged, str(merged), "AutoModelForCausalLM"
    if not spec.export.merged:
        model, tokenizer, auto = adapter, run.provenance()["model_path"], "AutoPeftModelForCausalLM"
    snippet = [f"from {'transformers' if spec.export.merged else 'peft'} import {auto}",
               "from transformers import AutoTokenizer",
               f"model = {auto}.from_pretrained({str(model)!r})",
               f"tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})"]
    parts = ["## Where it lies", listed, *_equality(run), "To load it:", _code("python", snippet)]
    return "\n\n".join(parts)


def _equality(run: RunDir) -> list[str]:
    """What was compared to say that the files are the trained model: one paragraph, or none for an old run."""
    file, losses = run.export / "equality.json", run.path / "evaluation" / "validation-loss.json"
    if not file.exists():
        return []
    equality = json.loads(file.read_text(encoding="utf-8"))
    if equality["compared"] == "weights":
        said = f"All {equality['tensors']:,} exported tensors are the trained ones, rounded to {equality['dtype']}."
    else:
        tokens, at_most = equality["tokens"], equality.get("tokens_at_most", equality["tokens"])
        share = equality["mean_abs"] / equality["spread"] if equality["spread"] else 0.0
        said = (
            f"The exported model's logits were compared with the trained model's on {tokens:,} of {at_most:,} held-out "
            f"tokens: they differ by {share:.2%} of their spread on average, and {equality['top1_agreement']:.1%} of "
            "the tokens have the same first choice.")
    if losses.exists():
        loss = json.loads(losses.read_text(encoding="utf-8"))
        said += (
            f" Their validation loss is {loss['found']:.4f} on {loss['rows']:,} of {loss['of_rows']:,} rows; training "
            f"measured {loss['expected']:.4f}.")
    return [said]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(group, model, cells) for each line of an evaluation; cells: the SHARES, perplexity, n; a dash for null."""
    groups = {"held-out": {name: row for name, row in evaluation.items() if name != "unseen"}}
    groups |= {"unseen": evaluation["unseen"]} if "unseen" in evaluation else {}
    return [
        (group, name, [*(_percent(row[key]) for key, _ in SHARES), _number(row["perplexity"]), str(row["n"])])
        for group, rows in groups.items()
        for name, row in rows.items()]


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """evaluation.json as a table, a line a model, in sections for held-out pairs and for functions in no training."""
    table = Table(title="Evaluation", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADS:
        table.add_column(heading, justify="left" if heading in HEADS[:2] else "right")
    before = None
    for group, name, cells in evaluation_rows(evaluation):
        if before not in (None, group):
            table.add_section()
        words = "" if group == before else GROUP_WORDS[group]
        table.add_row(words, name, *cells, style="bold" if name == "tuned" else None)
        before = group
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1e6 else f"{value:.2e}"
