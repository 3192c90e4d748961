"""report.md: how good the run's model is, what it cost, how to get it again, where it lies and how to load it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
from pathlib import Path

from ftlib import atomic, events
from ftlib.report.cost import stage_costs
from ftlib.report.tables import GROUP_WORDS, SHARES, evaluation_rows
from ftlib.rundir import RunDir

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


def write_report(run: RunDir) -> Path:
    """Write the report of an evaluated run to `run.report_file`, which is returned."""
    sections = [_title(run), _quality(run), _cost(run), _again(run), _files(run)]
    atomic.write_text(run.report_file, "\n\n".join(sections) + "\n")
    return run.report_file


def _title(run: RunDir) -> str:
    spec = run.spec()
    return f"# {run.name}\n\n{spec.description}".rstrip() + (
        f"\n\n{spec.method.kind} of `{spec.model.name}`: rank {spec.method.rank}, learning rate {spec.optim.lr:g}, "
        f"{_length(run)}, {spec.train.global_batch} rows of {spec.data.seq_len} tokens a step.")


def _length(run: RunDir) -> str:
    train = run.spec().train
    return f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs"


def _quality(run: RunDir) -> str:
    evaluation = json.loads(run.evaluation_file.read_text(encoding="utf-8"))
    heads = ["asked on", "model", *(words for _, words in SHARES), "perplexity", "pairs"]
    lines = [_row(heads), _row(["---", "---", *["---:"] * (len(heads) - 2)])]
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
        texts = [f"{title}\n\n{_quoted(sample.get(key) or '(nothing)')}" for title, key in parts]
        shown.append("\n\n".join([f"### Sample {number}{verdict}", *texts]))
    return shown


def _cost(run: RunDir) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    plan = run.plan()
    costs = stage_costs(events.read(run.events), plan, now)
    lines = [_row(["stage", "lives", "wall time", "lost", "GPU-hours"]), _row(["---", *["---:"] * 4])]
    names = [cost.stage for cost in costs]
    figures = [[c.lives, c.seconds, c.lost_seconds, c.gpu_hours] for c in costs]
    sums = [sum(row[column] for row in figures) for column in range(4)]
    for name, (lives, seconds, lost, gpu_hours) in zip([*names, "all"], [*figures, sums], strict=True):
        lines.append(_row([name, str(lives), _duration(seconds), _duration(lost), f"{gpu_hours:.2f}"]))
    return "## What it cost\n\n" + "\n".join(lines) + f"\n\nOn cluster `{plan.get('cluster', '?')}`, without queueing."


def _again(run: RunDir) -> str:
    provenance, prepared = run.provenance(), run.prepared()
    code = provenance.get("code") or {}
    commit = code.get("commit")
    words = provenance.get("said") or {"MODEL": run.spec().recipe}
    submit = " ".join(["make submit", *(f"{name}={shlex.quote(value)}" for name, value in words.items()), "NEW=1"])
    commands = [f"git checkout {commit}"] if commit else []
    changed = (
        f"The checkout had changes that are in no commit; what ran is in `{run.code}`.\n\n"
        if code.get("changed")
        else "")
    versions = {name: _version(name) for name in PACKAGES}
    facts = {
        "code": commit or f"no commit; what ran is in {run.code}",
        "data": f"{provenance.get('data_path') or 'the generator'}, digest {provenance.get('data_digest')}",
        "dataset": f"digest {prepared['digest']}", "model": str(provenance.get("model_path")),
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items() if v)}
    return f"## How to get it again\n\n{_code('sh', [*commands, submit])}\n\n{changed}" + "\n".join(
        f"- {name}: {value}" for name, value in facts.items())


def _files(run: RunDir) -> str:
    spec, prepared = run.spec(), run.prepared()
    merged, adapter = run.export / "merged", run.export / "adapter"
    places = {
        "merged weights": merged if spec.export.merged else None, "adapter": adapter if adapter.exists() else None,
        "checkpoints": run.checkpoints, "loss of every step": run.metrics_file, "scores": run.evaluation_file,
        "every answer": run.path / "evaluation", "packed dataset": prepared["dataset"]}
    listed = "\n".join(f"- {name}: `{place}`" for name, place in places.items() if place)
    if spec.export.merged:
        snippet = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({str(merged)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(merged)!r})"]
    else:
        snippet = [
            "from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer",
            f"model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({run.provenance()['model_path']!r})"]
    return f"## Where it lies\n\n{listed}\n\nTo load it:\n\n{_code('python', snippet)}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _quoted(text: str) -> str:
    """Text in an indented block, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
