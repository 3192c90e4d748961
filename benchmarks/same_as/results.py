"""What a run or a dry run gave, as named parts that can be laid side by side. Only plain files are read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import deserialize

# What a row of metrics.jsonl says of a step beside when and how fast it was.
STEP_FIELDS = ("loss", "grad_norm", "lr", "tokens", "eval_loss")
SECTION = re.compile(r"^===== (.+) =====$", re.MULTILINE)
# A run's or sweep's name, from the name of its job.
JOB_OF_RUN = re.compile(r"--job-name='?([\w.-]+-[0-9a-f]{8})\b")
END_OF_SCRIPTS = "\nDry run: nothing was queued."

# Name of a part -> its value, which is equal or not.
Parts = dict[str, Any]


def of_run(run: Path) -> Parts:
    """The parts of a finished run's folder: id, dataset, metrics by step, weights, scores. A part whose file is not
    there is left out."""
    found: Parts = {"run id": run.name}
    if (dataset := _dataset(run)) is not None:
        found["dataset"] = dataset
    by_step = _metrics(run / "metrics.jsonl")
    for field in STEP_FIELDS:
        values = {str(step): row[field] for step, row in sorted(by_step.items()) if field in row}
        if values:
            found[field] = values
    folders = {"adapter": run / "export" / "adapter", "merged weights": run / "export" / "merged"}
    folders["soft prompt"] = run / "export" / "prompt"
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if checkpoints:
        folders["trained weights"] = checkpoints[-1]
    for part, folder in folders.items():
        if files := sorted(folder.rglob("*.safetensors")):
            found[part] = tensors_digest(files)
    if (scores := run / "evaluation.json").exists():
        found["scores"] = json.loads(scores.read_text(encoding="utf-8"))
    return found


def tensors_digest(files: list[Path]) -> str:
    """sha256 over name, type, shape and bytes of all tensors, however they are spread over files."""
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        tensors.update(deserialize(file.read_bytes()))
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
        digest.update(tensor["data"])
    return digest.hexdigest()


def _dataset(run: Path) -> str | None:
    """sha256 over the rows of the run's dataset. Its own digest also covers the code that made it, so that any change
    of a comment there would show as a difference of data."""
    prepared = run / "prepared.json"
    if not prepared.exists():
        return None
    folder = Path(json.loads(prepared.read_text(encoding="utf-8"))["dataset"])
    digest = hashlib.sha256()
    for file in sorted([*folder.rglob("*.bin"), *folder.rglob("*.jsonl")]):
        digest.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _metrics(file: Path) -> dict[int, dict[str, Any]]:
    """What is recorded of each step; of a step that was done twice, what the later attempt wrote."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a killed attempt may have left half a line
        by_step.setdefault(row["step"], {}).update(row)
    return by_step


def steps_recorded(run: Path) -> int:
    """How many optimizer steps the run has recorded."""
    return sum("loss" in row for row in _metrics(run / "metrics.jsonl").values())


def of_dry_run(output: str, tree: Path) -> Parts:
    """The scripts that a dry run printed, by their name, with this machine's folders and the run's id taken out."""
    pieces = SECTION.split(output.partition(END_OF_SCRIPTS)[0])
    names, texts = pieces[1::2], pieces[2::2]
    found: Parts = {}
    for name, text in zip(names, texts, strict=True):
        ids = sorted(set(JOB_OF_RUN.findall(text)))
        if ids:
            found["run id"] = " ".join(ids)
        found[name] = _comparable(text, tree, ids)
    return found


def _comparable(script: str, tree: Path, run_ids: list[str]) -> str:
    plain = script.strip().replace(str(tree), "/checkout")
    for run_id in run_ids:
        plain = plain.replace(run_id, "<run>")
    # One word on a line: the difference then names the option, or the variable that enters an image.
    return re.sub("^(srun|export FT_PASS=) ?.*", lambda line: line[0].replace(" ", "\n  "), plain, flags=re.MULTILINE)
