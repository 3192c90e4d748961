"""Where examples come from: a file of rows, a hub dataset or the generator, split into train, validation and test."""

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ftlib.data import conversations
from ftlib.data.formats import problem, refuse
from ftlib.data.synthesis import generate
from ftlib.data.values import SPLITS, Split
from ftlib.errors import InputError, nearest
from ftlib.spec import DataSpec, file_digest

Row = dict[str, Any]
Placed = conversations.Placed
BLANK = b" \t\r\n\xef\xbb\xbf"  # white space and a byte order mark
KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
LISTED = 20
UNSEEN_PAIRS = 64
# The group of test questions like those that were trained on.
HELD_OUT = "held-out"


@dataclass(frozen=True)
class FileSummary:
    """A data file that was read whole and found good. `rows`: examples in it; `digest`: sha256 of its bytes."""

    path: Path
    rows: int
    digest: str
    bytes: int


@dataclass(frozen=True)
class Sources:
    """Rows of each part. `test` holds pairs of (group, row); a group is "held-out" or "unseen"."""

    train: list[Row]
    validation: list[Row]
    test: list[tuple[str, Row]]


def check_file(path: Path, data: DataSpec | None = None) -> FileSummary:
    """Read every row of a .jsonl or .json file (or .gz of one) and split it as `data` says (default: DataSpec()).
    Raises InputError: missing, empty, not text, too few rows to hold some out; or with the bad rows, by line number."""
    data = data or DataSpec()
    counts = dict.fromkeys(SPLITS, 0)
    for row in good_rows(_rows(path), str(path), data):
        counts[part_of(row, data)] += 1
    _check_parts(str(path), counts, data)
    return FileSummary(path, sum(counts.values()), file_digest(path), path.stat().st_size)


def read(data: DataSpec, source: Path | list[Row] | None, *, test_pairs: int) -> Sources:
    """All examples of a file, of a hub dataset's rows, or of the generator without either, seeded by `data.seed`.
    The generator gives `test_pairs` held-out pairs and UNSEEN_PAIRS of functions in no training; of a file or dataset,
    the share `data.held_out` is held out."""
    if source is None:
        train = generate(data.functions, "train", data.pairs, data.seed)
        validation = generate(data.functions, "validation", max(1, min(500, data.pairs // 20)), data.seed)
        held_out = generate(data.functions, "test", test_pairs, data.seed)
        unseen = generate("unseen", "test", UNSEEN_PAIRS, data.seed)
        test = [(HELD_OUT, row) for row in held_out] + [("unseen", row) for row in unseen]
        return Sources(_chosen(train, data), validation, test)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    where = str(source) if isinstance(source, Path) else f"data.hub={data.hub}"
    for row in good_rows(_rows(source), where, data) if isinstance(source, Path) else source:
        parts[part_of(row, data)].append(row)
    _check_parts(where, {part: len(rows) for part, rows in parts.items()}, data)
    # Only the first so many are evaluated: the order must not be the file's, which may be sorted.
    random.Random(data.seed).shuffle(parts["test"])
    return Sources(_chosen(parts["train"], data), parts["validation"], [(HELD_OUT, row) for row in parts["test"]])


def part_of(row: Row, data: DataSpec) -> Split:
    """The part of a file's row, by its content and the seed alone: rows that are added later move no other row."""
    share = _rank(row, data.seed) / 2**64
    return "test" if share < data.held_out / 2 else "validation" if share < data.held_out else "train"


def _rank(row: Row, seed: int, purpose: str = "") -> int:
    """64 bits from what a row says (not from fields nobody reads, such as an id)."""
    content = [row.get(field) or "" for field in ("instruction", "input", "output", "prompt", "response")]
    content += [[(message["role"], message["content"]) for message in row["messages"]]] if "messages" in row else []
    text = json.dumps([purpose, seed, content], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _chosen(rows: list[Row], data: DataSpec) -> list[Row]:
    """As many rows as `data.share` and `data.limit` leave, chosen by the seed, in their old order."""
    count = min(math.ceil(len(rows) * (data.share or 1)), data.limit or len(rows))
    if count >= len(rows):
        return rows
    first = sorted(range(len(rows)), key=lambda index: _rank(rows[index], data.seed, "limit"))[:count]
    return [rows[index] for index in sorted(first)]


def _check_parts(where: str, counts: dict[str, int], data: DataSpec) -> None:
    if empty := [part for part, rows in counts.items() if not rows]:
        total = sum(counts.values())
        larger = min(0.4, round(10 / max(1, total), 2))
        more = f', or hold out more with SET="data.held_out={larger}"' if larger > data.held_out else ""
        raise InputError(
            f"{where}: {total} rows are too few: data.held_out={data.held_out} leaves none for {' and '.join(empty)}; "
            f"give more rows{more}")


def good_rows(rows: Iterable[Placed], where: str, data: DataSpec, *, tolerated: float = 0.0) -> Iterator[Row]:
    """The examples in the rows of a file or dataset; after the last, InputError if some were bad or there was none.
    Message trees become their best paths; `data.format`, else the first row, says whether the rows are such. Up to the
    share `tolerated` of bad rows is left out, and said: a published dataset is not its user's to mend."""
    listed: list[str] = []
    examples = bad = 0
    for place, row in _as_examples(iter(rows), data):
        examples += 1
        wrong = row if isinstance(row, str) else _not_of(data.format, row) or problem(row, data.template)
        if wrong is not None:
            bad += 1
            listed += [f"{where}, {place}: {wrong}"] if bad <= LISTED else []
        elif not bad or tolerated:
            yield cast(Row, row)
    if bad > tolerated * examples:
        raise InputError(listed + [f"{where}: and {bad - LISTED} more"] * (bad > LISTED))
    if bad:
        print(f"{where}: left out {bad} of {examples:,} rows, such as {listed[0]}", flush=True)
    if not examples:
        raise InputError(f"{where}: is empty; it must hold one JSON object a line, or a list of them in a .json file")


def _as_examples(rows: Iterator[Placed], data: DataSpec) -> Iterator[Placed]:
    head = next(rows, None)
    if head is None:
        return rows
    rows, kind = itertools.chain([head], rows), data.format
    if kind == "oasst-trees" or (kind is None and conversations.is_tree(head[1])):
        return conversations.from_trees(rows)
    if kind == "oasst-messages" or (kind is None and conversations.is_message(head[1])):
        return conversations.from_messages(rows)
    return rows


def _not_of(kind: str | None, row: object) -> str | None:
    """Why a row is not of the format that was asked for, or None."""
    field = {"alpaca": "instruction", "prompt": "prompt", "messages": "messages"}.get(kind or "")
    if field is None or not isinstance(row, dict) or field in row:
        return None
    return f"is not of data.format={kind}: field {field!r} is missing; found {', '.join(map(repr, row)) or 'no fields'}"


def _rows(path: Path) -> Iterator[Placed]:
    """Every row as (its place in words, its value); a value that is a str says why the row cannot be read."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if f".{kind}" not in KINDS:
        raise InputError(f"{path}: is of no known kind; allowed: {', '.join(KINDS)}.{nearest(path.suffix, KINDS)}")
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            if kind == "json":
                yield from _items(path, file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip(BLANK):
                    yield f"line {number}", _parse(path, line, f"line {number}")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*") if p.name.lower().endswith(KINDS)])
        raise InputError(f"{path}: there is no such file.{near}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _items(path: Path, text: bytes) -> Iterator[Placed]:
    """The rows of a .json file, which is one list."""
    if not text.strip(BLANK):
        return
    rows = _parse(path, text, "the file")
    if isinstance(rows, str):
        raise InputError(f"{path}: {rows}")
    if not isinstance(rows, list):
        raise InputError(f"{path}: a .json file must hold one list of objects; one object a line is a .jsonl file")
    for number, row in enumerate(rows, start=1):
        yield f"item {number}", row if not isinstance(row, str) else "a row must be a JSON object, found text"


def _parse(path: Path, text: bytes, place: str) -> object:
    """JSON text as its value; a str says what is wrong. Bytes that are no text at all raise InputError at once."""
    try:
        value = _DECODER.decode(text.decode("utf-8-sig"))
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise InputError(f"{path}, {place}: is not text (UTF-8); found byte {text[:40]!r}…") from None
    except UnicodeEncodeError:
        return "holds half of a two-part character (a lone \\ud800 to \\udfff)"
    except RecursionError:
        return "is nested too deeply"
    except json.JSONDecodeError as error:
        spot = f"line {error.lineno}, column {error.colno}" if place == "the file" else f"column {error.colno}"
        return f"is no JSON: {error.msg} at {spot}"
    except ValueError as error:
        return f"is no JSON: {error}"
    return "a row must be a JSON object, found text" if isinstance(value, str) else value


_DECODER = json.JSONDecoder(parse_constant=refuse)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
