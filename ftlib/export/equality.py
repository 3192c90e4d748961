"""How far two models' logits lie apart on the same rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ftlib.data.dataset import IGNORED, collate
from ftlib.stop import StopFlag

Logits = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@torch.no_grad()
def compare(
    reference: Logits, other: Logits, rows: Dataset[Any], count: int, batch: int, stop: StopFlag
) -> dict[str, Any]:
    """How the logits of all real tokens of the first `count` rows differ, `batch` rows at once.
    max_abs, mean_abs, top1_agreement (a share), spread (the reference's standard deviation), rows, tokens."""
    worst = total = squares = plain = agree = 0.0
    entries = tokens = 0
    for start in range(0, count, batch):
        stop.check()
        inputs = collate([rows[i] for i in range(start, min(start + batch, count))])
        # Every document ends with a target, so what follows a row's last one is padding.
        real = inputs["labels"].ne(IGNORED).flip(1).cumsum(1).flip(1) > 0
        one, two = (model(inputs).float()[real] for model in (reference, other))
        gap = (one - two).abs()
        worst, total = max(worst, float(gap.max())), total + float(gap.double().sum())
        plain, squares = plain + float(one.double().sum()), squares + float(one.double().square().sum())
        agree += float((one.argmax(-1) == two.argmax(-1)).sum())
        entries, tokens = entries + one.numel(), tokens + one.shape[0]
    spread = math.sqrt(max(0.0, squares / entries - (plain / entries) ** 2))
    said = {"max_abs": worst, "mean_abs": total / entries, "top1_agreement": agree / tokens, "spread": spread}
    return {**said, "rows": count, "tokens": tokens}


def logits_of(
    model: torch.nn.Module, device: torch.device, autocast: bool = False, prompt: Sequence[int] = ()
) -> Logits:
    """A function from rows (rows, seq) to `model`'s logits (rows, seq, vocabulary); before each row stands `prompt`."""

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
