"""Whether exported files compute what the trained model computes: logits of held-out rows, within a time budget.

The trained model's logits are stored first; then it is dropped and the merged model is loaded, so the two are never in
memory together. What is stored, and how far the comparison came, survives an interruption: see docs/export.md."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from ftlib import atomic
from ftlib.data.dataset import IGNORED, collate
from ftlib.stop import StopFlag

ROWS = 64  # Held-out rows compared, or all there are.
# Logits of the trained model that are stored at most; at least one batch is.
STORED_BYTES = 4 << 30
# Logits of one batch: 1 GiB in fp32. A single row may have more.
BATCH_LOGITS = 2**28
# Tokens whose logits are compared at once.
CHUNK_TOKENS = 1024
PRINT_EVERY_S = 10
# Of the time budget, what the trained model's logits may take where a merged model is compared with them.
REFERENCE_SHARE = 0.5

Logits = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@dataclass
class Difference:
    """How two models' logits differ, summed over the tokens seen so far."""

    worst: float = 0.0
    total: float = 0.0  # Of absolute differences.
    plain: float = 0.0  # Of the reference's logits,
    squares: float = 0.0  # and of their squares.
    agree: int = 0  # Tokens for which both have the same first choice.
    entries: int = 0
    tokens: int = 0
    rows: int = 0

    def add(self, reference: torch.Tensor, other: torch.Tensor, *, rows: int) -> None:
        """Logits of the same tokens by both models, each (tokens, vocabulary), of so many rows."""
        for start in range(0, len(reference), CHUNK_TOKENS):
            one, two = (logits[start : start + CHUNK_TOKENS].float() for logits in (reference, other))
            gap = (one - two).abs()
            largest = float(gap.max())
            self.worst = largest if math.isnan(largest) else max(self.worst, largest)
            self.total += float(gap.double().sum())
            self.plain += float(one.double().sum())
            self.squares += float(one.double().square().sum())
            self.agree += int((one.argmax(-1) == two.argmax(-1)).sum())
            self.entries += one.numel()
            self.tokens += len(one)
        self.rows += rows

    def summary(self) -> dict[str, Any]:
        """max_abs, mean_abs, top1_agreement (a share), spread (the reference's standard deviation), rows, tokens."""
        spread = math.sqrt(max(0.0, self.squares / self.entries - (self.plain / self.entries) ** 2))
        return {
            "max_abs": self.worst, "mean_abs": self.total / self.entries, "top1_agreement": self.agree / self.tokens,
            "spread": spread, "rows": self.rows, "tokens": self.tokens}


@dataclass
class Progress:
    """How far a comparison has come; written after every batch."""

    batch: int  # Rows a batch; another number is another comparison.
    stored: int = 0  # Batches whose reference logits are stored,
    stored_all: bool = False  # which are all that will be.
    compared: int = 0  # Batches of these that the merged model was compared on.
    seconds: float = 0.0  # Spent on forward passes so far, over all attempts.
    adapter: Difference = field(default_factory=Difference)
    merged: Difference = field(default_factory=Difference)


class Comparison:
    """The comparison of one export, in a folder of its own."""

    def __init__(self, folder: Path, rows: Dataset[Any], *, count: int, batch: int, vocabulary: int,
                 budget_s: float, stop: StopFlag, committed: Callable[[str], None]) -> None:  # fmt: skip
        """count: rows to compare at most; batch: rows of a forward pass at most; committed: gets each new piece."""
        self._folder, self._rows, self._stop, self._committed = folder, rows, stop, committed
        self._count, self._budget_s, self._printed = count, budget_s, time.monotonic()
        length = len(rows[0]["input_ids"])
        batch = max(1, min(batch, BATCH_LOGITS // (length * vocabulary)))
        self._file = folder / "progress.json"
        self.progress = self._read(batch)
        folder.mkdir(exist_ok=True)

    @property
    def tokens_at_most(self) -> int:
        """Tokens of all the rows that would be compared without a time budget."""
        return sum(int(_real(self._inputs(start)).sum()) for start in self._starts())

    @property
    def finished(self) -> bool:
        """Whether the merged model needs no more comparing."""
        progress = self.progress
        spent = progress.compared > 0 and progress.seconds >= self._budget_s
        return progress.stored_all and (spent or progress.compared == progress.stored)

    def store(self, reference: Logits, exported: Logits | None, *, share: float) -> None:
        """Store `reference`'s logits, and compare the exported adapter's with them, until that is done for all rows,
        takes too much room, or `share` of the budget is spent. At least one batch. Raises Interrupted."""
        size = 0
        for number, start in enumerate(self._starts()):
            file = self._reference(number)
            if number >= self.progress.stored:
                spent = self.progress.seconds >= share * self._budget_s
                if number and (spent or size * (number + 1) / number > STORED_BYTES):
                    break
                self._stop.check()
                began = time.monotonic()
                inputs = self._inputs(start)
                real = _real(inputs)
                logits = reference(inputs)[real].contiguous()
                if exported is not None:
                    self.progress.adapter.add(logits, exported(inputs)[real], rows=len(real))
                self._write_reference(file, logits)
                self.progress.stored = number + 1
                self._write(began, f"logits of rows {start} to {start + len(real) - 1}")
            size += file.stat().st_size
        self.progress.stored_all = True
        self._write(time.monotonic(), "")

    def compare(self, merged: Logits) -> None:
        """Compare `merged` with the stored logits until all are, or the budget is spent. At least one batch.
        Raises Interrupted."""
        for number, start in enumerate(self._starts()[: self.progress.stored]):
            if number < self.progress.compared:
                continue
            if self.finished:
                return
            self._stop.check()
            began = time.monotonic()
            inputs = self._inputs(start)
            real = _real(inputs)
            reference = load_file(self._reference(number))["logits"]
            self.progress.merged.add(reference, merged(inputs)[real], rows=len(real))
            self.progress.compared = number + 1
            self._write(began, f"rows {start} to {start + len(real) - 1} compared")

    def _starts(self) -> range:
        return range(0, self._count, self.progress.batch)

    def _inputs(self, start: int) -> dict[str, torch.Tensor]:
        return collate([self._rows[i] for i in range(start, min(start + self.progress.batch, self._count))])

    def _reference(self, number: int) -> Path:
        return self._folder / f"logits-{number:04d}.safetensors"

    def _write_reference(self, file: Path, logits: torch.Tensor) -> None:
        temporary = atomic.temporary_beside(file)
        save_file({"logits": logits}, temporary)
        atomic.fsync(temporary)
        temporary.rename(file)

    def _read(self, batch: int) -> Progress:
        try:
            values = json.loads(self._file.read_text(encoding="utf-8"))
            adapter, merged = Difference(**values.pop("adapter")), Difference(**values.pop("merged"))
            progress = Progress(**values, adapter=adapter, merged=merged)
        except (OSError, ValueError, TypeError, KeyError):
            return Progress(batch)
        whole = all(self._reference(number).exists() for number in range(progress.stored))
        return progress if progress.batch == batch and whole else Progress(batch)

    def _write(self, began: float, piece: str) -> None:
        self.progress.seconds += time.monotonic() - began
        atomic.write_json(self._file, asdict(self.progress))
        if piece:
            self._committed(piece)
        if time.monotonic() - self._printed > PRINT_EVERY_S:
            self._printed = time.monotonic()
            print(f"equality: {piece}; {self.progress.seconds:.0f} s of at most {self._budget_s:.0f} s", flush=True)


def _real(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are no padding, (rows, seq): every document ends with a target, so what follows a row's last one
    is padding."""
    return inputs["labels"].ne(IGNORED).flip(1).cumsum(1).flip(1) > 0


@torch.no_grad()
def compare(
    reference: Logits, other: Logits, rows: Dataset[Any], count: int, batch: int, stop: StopFlag
) -> dict[str, Any]:
    """`Difference.summary` of two models that are both at hand, over the first `count` rows, `batch` rows at once."""
    difference = Difference()
    for inputs in _batches(rows, count, batch):
        stop.check()
        real = _real(inputs)
        difference.add(reference(inputs)[real], other(inputs)[real], rows=len(real))
    return difference.summary()


def _batches(rows: Dataset[Any], count: int, batch: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, count, batch):
        yield collate([rows[i] for i in range(start, min(start + batch, count))])


def logits_of(
    model: torch.nn.Module, device: torch.device, autocast: bool = False, prompt: Sequence[int] = ()
) -> Logits:
    """A function from rows (rows, seq) to `model`'s logits (rows, seq, vocabulary), on the CPU; before each row stands
    `prompt`. autocast: to bfloat16, as where training computes in it."""

    @torch.no_grad()
    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = {name: values.to(device) for name, values in inputs.items() if name != "labels"}
        if prompt:
            ids = torch.tensor([prompt] * len(moved["input_ids"]), device=device)
            before = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            moved = {name: torch.cat([values, moved[name]], dim=1) for name, values in before.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            # A cache would make the packed documents of a row see each other.
            found = model(**moved, use_cache=False).logits
        # A soft prompt has logits, too.
        return found[:, -inputs["input_ids"].shape[1] :].cpu()  # type: ignore[no-any-return]

    return logits
