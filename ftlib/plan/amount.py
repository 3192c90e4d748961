"""How much there is to train on, before the data is read: from a file's size, or from what the generator will make."""

import math
from dataclasses import dataclass

from ftlib.spec import RunSpec

# Mean length of an example in the template, prompt and response together, in tokens.
TOKENS_PER_PAIR = {"brief": 125, "alpaca": 210, "chatml": 200, "guanaco": 450}
BYTES_PER_TOKEN = 3.5


@dataclass(frozen=True, kw_only=True)
class Amount:
    """The training data in numbers; None where its size is not known."""

    tokens: float | None
    rows: float | None
    row_tokens: float  # a row's mean length as it is computed: seq_len where rows are packed


def estimate(spec: RunSpec, data_bytes: int | None) -> Amount:
    """What the recipe's data amounts to. data_bytes: size of the file or hub dataset, None for the generator's pairs
    and for a hub dataset that nobody has measured.

    With a soft prompt each example is a row of its own, as long as itself; a batch is padded to its longest.
    """
    data, an_example = spec.data, TOKENS_PER_PAIR[spec.data.template]
    tokens: float | None = None
    if data_bytes is not None:
        tokens = data_bytes / BYTES_PER_TOKEN
    elif not data.hub:
        tokens = data.pairs * an_example
    if data.limit:
        tokens = min(math.inf if tokens is None else tokens, data.limit * an_example)
    if tokens is not None and data.share:
        tokens *= data.share
    row_tokens = float(data.seq_len)
    if spec.method.prompted:
        row_tokens = min(data.seq_len, an_example) + spec.method.prompt_tokens
        rows = None if tokens is None else tokens / an_example
    else:
        rows = None if tokens is None else tokens / data.seq_len
    return Amount(tokens=tokens, rows=None if rows is None else max(1.0, rows), row_tokens=row_tokens)
