"""The prepare stage: sources become <cache>/datasets/<digest>, named by all that decides its content: packed rows of
train and validation (packing.py), test.jsonl (what evaluation asks, an object a line), meta.json (origin, counts)."""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib import atomic
from ftlib.data import hub, packing, sources, tokenizing
from ftlib.data.formats import example_call, expected_call, render
from ftlib.errors import InputError
from ftlib.interruptible import interruptible
from ftlib.rundir import RunDir
from ftlib.spec import RunSpec, file_digest
from ftlib.stop import StopFlag

BLOCK = 1_000
PROGRESS_S = 5.0
ABANDONED_S = 86_400.0


def prepare(run: RunDir, stop: StopFlag, model_commit: str | None = None) -> dict[str, Any]:
    """Make the run's dataset, or find it made; returns what prepared.json then holds.
    model_commit: the commit of a hub model that the run uses from here on, whatever its branch does meanwhile.
    Raises InputError for wrong or changed data or a missing tokenizer, Interrupted when asked to stop."""
    began = time.monotonic()
    spec, provenance = run.spec(), run.provenance()
    source: Path | list[sources.Row] | None = None
    named = data_digest = "generator"
    if provenance["data_path"]:
        source = Path(provenance["data_path"])
        named, data_digest = str(source), _unchanged(source, provenance["data_digest"])
    elif spec.data.hub:
        source = interruptible(stop, lambda: hub.fetch(spec.data))
        named, data_digest = hub.name(spec.data), hub.digest(source)
    tokenizer = tokenizing.load(provenance["model_path"], model_commit or spec.model.revision, spec.tokens.add)
    digest = dataset_digest(spec, data_digest, tokenizer)
    datasets = Path(provenance["cache"]) / "datasets"
    folder = datasets / digest
    meta = _whole(folder)
    if not (reused := meta is not None):
        try:
            datasets.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cluster.cache: {datasets} cannot be made: {error}") from None
        atomic.sweep_temporaries(datasets, still_s=ABANDONED_S)
        temporary = atomic.temporary_beside(folder)
        try:
            print(f"reading {named}", flush=True)
            rows = sources.read(spec.data, source, test_pairs=spec.evaluate.pairs)
            meta = {"digest": digest, "source": named, "data_digest": data_digest}
            meta |= {"tokenizer": provenance["model_path"]} | _build(temporary, spec, rows, tokenizer, stop)
            atomic.write_json(temporary / "meta.json", meta)
            if folder.exists() and _whole(folder) is None:
                atomic.discard_folder(folder)
            atomic.commit_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        print(f"found the dataset in {folder}", flush=True)
    prepared = {"dataset": str(folder), "digest": digest} | {p: meta[p] for p in ("train", "validation", "test")}
    prepared |= {"model_commit": model_commit} if model_commit else {}
    prepared |= {"reused": reused, "seconds": round(time.monotonic() - began, 2)}
    atomic.write_json(run.prepared_file, prepared)
    return prepared


def dataset_digest(spec: RunSpec, data_digest: str, tokenizer: tokenizing.Tokenizer) -> str:
    """32 hex digits from all that decides a dataset: the data, how it is cut, the tokenizer, this package."""
    code = [file_digest(path) for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in (".py", ".yaml")]
    # Where the rows lie decides nothing; how many pairs are tested decides how many the generator makes.
    wish = spec.data.model_dump(mode="json", exclude={"path", "hub", "revision"}) | {"test_pairs": spec.evaluate.pairs}
    wish["packed"] = not spec.method.prompted
    parts = json.dumps([data_digest, wish, tokenizer.digest(), code], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _unchanged(path: Path, submitted: str) -> str:
    try:
        digest = file_digest(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}. Does every node see it?") from None
    if digest != submitted:
        raise InputError(f"{path}: has changed since the run was submitted; submit again, that is another run")
    return digest


def _whole(folder: Path) -> dict[str, Any] | None:
    """A committed dataset's meta; None when it is not there or a file was lost or cut since."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for part in ("train", "validation"):
            packing.read(folder / part)
        lines = (folder / "test.jsonl").read_bytes().count(b"\n")
        return dict(meta) if lines == meta["test"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    folder: Path, spec: RunSpec, rows: sources.Sources, tokenizer: tokenizing.Tokenizer, stop: StopFlag
) -> dict[str, Any]:
    """Write the parts of a dataset into `folder`; returns their counts."""
    counted = {"training": rows.train, "validation": rows.validation, "test": rows.test}
    print(", ".join(f"{len(part):,} {name}" for name, part in counted.items()), "examples", flush=True)
    counts: dict[str, Any] = {}
    for part, chosen in (("train", rows.train), ("validation", rows.validation)):
        documents, _ = _encode(part, chosen, spec, tokenizer, stop)
        counts[part] = meta = packing.write(
            folder / part, documents, vocabulary=len(tokenizer), pad=tokenizer.pad, seed=spec.data.seed,
            packed=not spec.method.prompted)
        full, targets = meta["tokens"] / (meta["rows"] * meta["seq_len"]), meta["response_tokens"] / meta["tokens"]
        print(
            f"{part}: packed {meta['examples']:,} examples into {meta['rows']:,} rows of {meta['seq_len']} tokens, "
            f"{full:.1%} full, {targets:.0%} of the tokens are targets", flush=True)
    documents, kept = _encode("test", [row for _, row in rows.test], spec, tokenizer, stop)
    if not any(group == sources.HELD_OUT for group, _ in itertools.compress(rows.test, kept)):
        raise InputError(
            f"every held-out example is longer than data.seq_len={spec.data.seq_len} tokens, so that there is nothing "
            "to evaluate on; use a longer one or shorter examples")
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for group, row in itertools.compress(rows.test, kept):
            file.write(json.dumps(_question(row, group, spec.data.template), ensure_ascii=False) + "\n")
    return counts | {"test": sum(kept), "test_dropped_too_long": documents.dropped_too_long}


def _encode(
    part: str, rows: Sequence[sources.Row], spec: RunSpec, tokenizer: tokenizing.Tokenizer, stop: StopFlag
) -> tuple[tokenizing.Documents, list[bool]]:
    """Rows as documents, block by block, with progress; for each row, whether it was short enough."""
    documents, kept = tokenizing.Documents(spec.data.seq_len), []
    began = spoken = time.monotonic()
    for start in range(0, len(rows), BLOCK):
        stop.check()
        kept += documents.add(tokenizer, [render(row, spec.data.template) for row in rows[start : start + BLOCK]])
        now = time.monotonic()
        if now - spoken > PROGRESS_S or len(kept) == len(rows):
            spoken, speed = now, len(documents.tokens) / max(now - began, 1e-9)
            print(
                f"{part}: tokenised {len(kept):,} of {len(rows):,} examples, {len(documents.tokens):,} tokens, "
                f"{speed / 1e6:.2f} Mtok/s, {(now - began) / len(kept) * (len(rows) - len(kept)):.0f} s left",
                flush=True)
    longer = f"longer than data.seq_len={spec.data.seq_len} tokens"
    if not any(kept):
        raise InputError(f"all {len(rows):,} {part} examples are {longer}; use a longer one or shorter examples")
    if documents.dropped_too_long:
        print(f"{part}: dropped {documents.dropped_too_long:,} examples {longer}", flush=True)
    return documents, kept


def _question(row: sources.Row, group: str, template: str) -> dict[str, Any]:
    example = render(row, template)
    calls = {"expected_call": expected_call(row), "example_call": example_call(row)}
    # A conversation's last answer is asked for; its earlier turns stand before the question, as in training.
    prompt = [*example.before, example.prompt] if example.before else example.prompt
    return {"prompt": prompt, "response": example.response, **calls, "group": group}
