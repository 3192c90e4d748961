"""Makes the small data files beside it: `python samples/make_samples.py` (seeded; no downloads, nobody's data).

alpaca.jsonl        Alpaca rows with and without input
oasst_trees.jsonl   conversation trees as OpenAssistant exports them, with ranked replies
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS, TREES = 400, 40
WORDS = """
amber apple arrow autumn basket beach bridge candle castle cloud copper coral desert dragon engine feather field flame
forest garden glacier harbor hollow island ivory jungle kettle lantern lemon marble meadow mirror mountain needle ocean
orchard paper pepper pillow planet prairie quartz rabbit ribbon river saddle shadow silver spring stone summer temple
thunder timber tunnel valley velvet violin walnut window winter yellow zebra""".split()  # noqa: SIM905
CAPITALS = {
    "Austria": "Vienna", "Brazil": "Brasilia", "Canada": "Ottawa", "Chile": "Santiago", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "Estonia": "Tallinn", "Finland": "Helsinki", "France": "Paris",
    "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi",
    "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga", "Norway": "Oslo",
    "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Senegal": "Dakar", "Spain": "Madrid",
    "Sweden": "Stockholm", "Thailand": "Bangkok", "Tunisia": "Tunis", "Vietnam": "Hanoi",
}  # fmt: skip


def alpaca_row(rng: random.Random) -> dict[str, str]:
    """An instruction whose answer is exactly right; about half have an input."""
    few = rng.sample(WORDS, rng.randint(3, 5))
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    country = rng.choice(sorted(CAPITALS))
    instruction, given, output = rng.choice(
        [
            ("Sort the words alphabetically.", ", ".join(few), ", ".join(sorted(few))),
            ("Write the words in capital letters.", " ".join(few), " ".join(few).upper()),
            ("Name the longest word.", " ".join(few), max(few, key=len)),
            ("Reverse the order of the words.", " ".join(few), " ".join(reversed(few))),
            (f"What is {a} plus {b}?", "", f"{a} plus {b} is {a + b}."),
            (f"What is the capital of {country}?", "", f"The capital of {country} is {CAPITALS[country]}."),
            (f"Write the word {few[0]} three times.", "", f"{few[0]} {few[0]} {few[0]}"),
            (f"How many letters has the word {few[0]}?", "", f"The word {few[0]} has {len(few[0])} letters."),
        ]
    )
    return {"instruction": instruction, "input": given, "output": output}


def tree(rng: random.Random, number: int) -> dict[str, Any]:
    """A question with two or three ranked answers, in no order; under the best, some have another question."""
    country = sorted(CAPITALS)[number % len(CAPITALS)]
    word, (a, b) = WORDS[number], (rng.randint(2, 20), rng.randint(2, 20))
    question, answers = rng.choice(
        [
            (f"What is the capital of {country}?", [f"The capital of {country} is {CAPITALS[country]}.", "I forgot."]),
            (f"Can you add {a} and {b}?", [f"Yes: {a} plus {b} is {a + b}.", f"{a + b}", "No."]),
            (f"Which letter does {word} begin with?", [f"It begins with {word[0]}.", word]),
        ]
    )
    replies = [_message(rng, "assistant", text, rank=rank) for rank, text in enumerate(answers)]
    if rng.random() < 0.6:
        thanks = _message(rng, "assistant", "You are welcome! Ask me anything else.", rank=0)
        shrug = _message(rng, "assistant", "Fine.", rank=1)
        unanswered = _message(rng, "prompter", "Are you sure?")
        replies[0]["replies"] = [unanswered, _message(rng, "prompter", "Thank you.", replies=[shrug, thanks])]
    rng.shuffle(replies)
    root = _message(rng, "prompter", question, replies=replies)
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def _message(
    rng: random.Random, role: str, text: str, rank: int | None = None, replies: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    made: dict[str, Any] = {"message_id": f"{rng.getrandbits(64):016x}", "text": text, "role": role, "lang": "en"}
    return made | {"deleted": False} | ({} if rank is None else {"rank": rank}) | {"replies": replies or []}


def main() -> None:
    """Write both files."""
    rng = random.Random(0)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < ROWS:
        row = alpaca_row(rng)
        rows[json.dumps(row)] = row
    for name, made in (("alpaca", list(rows.values())), ("oasst_trees", [tree(rng, n) for n in range(TREES)])):
        text = "".join(json.dumps(row) + "\n" for row in made)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
