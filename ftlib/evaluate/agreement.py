"""Whether exported weights have the validation loss that training measured: for ZeRO, whose shards are joined where no
GPU is held, so that nothing there could compute with them."""

import json
import math
from pathlib import Path
from typing import Any

from ftlib import atomic
from ftlib.errors import FtError
from ftlib.rundir import RunDir
from ftlib.stop import StopFlag

# Relative difference allowed. Weights rounded to bf16 differ by less than 0.002 from their fp32 masters.
TOLERANCE = 0.005
# Validation rows that are read at most.
ROWS = 512
# Where fewer rows are read than training did: standard errors of the mean allowed on top.
STANDARD_ERRORS = 4


def require_validation_loss(run: RunDir, model: Any, stop: StopFlag) -> None:
    """Compute the validation loss of `model`, the exported one, and write evaluation/validation-loss.json, unless an
    earlier attempt did. Raises FtError when it is not the loss that training measured; Interrupted."""
    file = run.path / "evaluation" / "validation-loss.json"
    expected = json.loads((run.export / "equality.json").read_text(encoding="utf-8")).get("expected_loss")
    if expected is None or file.exists():
        return
    losses, targets, rows = _losses(run, model, stop)
    mean = sum(losses) / sum(targets)
    allowed = TOLERANCE * abs(expected)
    if len(losses) < rows:
        allowed += STANDARD_ERRORS * _standard_error(losses, targets, mean)
    found = {"expected": expected, "found": mean, "allowed": allowed, "rows": len(losses), "of_rows": rows}
    if not abs(mean - expected) <= allowed:
        raise FtError(
            f"the exported weights are not the trained ones: their validation loss is {mean:.5f}, training measured "
            f"{expected:.5f} at that checkpoint; {allowed:.2g} is allowed. Delete {run.export} and run "
            f"'make resume RUN={run.name}' to export again")
    atomic.write_json(file, found)
    print(f"validation loss of the exported weights: {mean:.5f}, in training {expected:.5f}", flush=True)


def _losses(run: RunDir, model: Any, stop: StopFlag) -> tuple[list[float], list[int], int]:
    """Summed loss and number of targets of each row read, and how many rows there are. As training computes it."""
    import torch

    from ftlib.data.dataset import IGNORED, PackedRows, collate
    from ftlib.train.falcon import isolate_documents

    isolate_documents(model)
    rows = PackedRows(Path(run.prepared()["dataset"]) / "validation")
    losses, targets = [], []
    for index in range(min(ROWS, len(rows))):
        stop.check()
        inputs = {name: values.to(model.device) for name, values in collate([rows[index]]).items()}
        with torch.no_grad():
            losses.append(float(model(**inputs, num_items_in_batch=1, use_cache=False).loss))
        targets.append(int(inputs["labels"][:, 1:].ne(IGNORED).sum()))
    return losses, targets, len(rows)


def _standard_error(losses: list[float], targets: list[int], mean: float) -> float:
    """Of a mean over rows that weigh as much as they have targets (a ratio estimator; Cochran, Sampling Techniques,
    chapter 6)."""
    count = len(losses)
    residuals = sum((loss - mean * target) ** 2 for loss, target in zip(losses, targets, strict=True))
    return math.sqrt(residuals / max(1, count - 1) / count) / (sum(targets) / count)
