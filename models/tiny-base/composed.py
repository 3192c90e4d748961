"""Functions composed at random, which train the tiny base model: verb x noun, one to three typed arguments.

Their breadth is the point: too many to learn by heart, so that a model must learn to copy the function and the argument
names from the example and the values from the question. Importing this adds them to the generator's catalogues.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import yaml

from ftlib.data.functions import Argument, Function
from ftlib.data.synthesis import CATALOGUES
from ftlib.data.values import invented_word

COUNT = 1500
PHRASINGS = 8
WORDS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))


@cache
def composed() -> tuple[Function, ...]:
    """`COUNT` functions of distinct names; every one has `PHRASINGS` phrasings and at least one free argument."""
    rng = random.Random("composed functions")
    names: dict[str, tuple[str, str]] = {}
    while len(names) < COUNT:
        # Invented words keep the model from learning names by heart: it can only copy them.
        verb, noun = (
            rng.choice(WORDS["verbs"]),
            invented_word(rng, 1, 3) if rng.random() < 0.4 else rng.choice(WORDS["nouns"]),
        )
        names[f"{verb}_{noun}"] = (verb, noun)
    return tuple(_function(rng, name, verb, noun) for name, (verb, noun) in names.items())


def _function(rng: random.Random, name: str, verb: str, noun: str) -> Function:
    arguments: dict[str, Argument] = {}
    makers = [_free, *rng.choices([_free, _mode, _flag], [5, 3, 2], k=rng.choice([0, 1, 1, 2, 2]))]
    rng.shuffle(makers)
    for make in makers:
        argument = make(rng)
        arguments.setdefault(argument.name, argument)
    if not any(argument.kind for argument in arguments.values()):
        raise AssertionError(name)
    return Function(name, tuple(arguments.values()), _phrasings(rng, verb, noun, list(arguments)))


def _free(rng: random.Random) -> Argument:
    kind = rng.choice(WORDS["kinds"])
    if kind in ("date", "time"):
        return Argument(f"{rng.choice(WORDS['when'])}_{kind}", kind)
    nouns = WORDS["text"] if kind in ("word", "phrase", "name", "handle", "code") else WORDS["number"]
    noun = invented_word(rng, 1, 3) if rng.random() < 0.3 else rng.choice(nouns)
    return Argument(f"{rng.choice(WORDS['qualifiers'])}_{noun}".strip("_"), kind)


def _mode(rng: random.Random) -> Argument:
    values = rng.sample(WORDS["choices"], rng.randint(2, 6))
    return Argument(rng.choice(WORDS["modes"]), choices={value: value for value in values})


def _flag(rng: random.Random) -> Argument:
    name = rng.choice(WORDS["flags"])
    yes, no = rng.choice([("{}", "not {}"), ("with {}", "without {}"), ("{} on", "{} off"), ("{}", "never {}")])
    return Argument(name, choices={True: yes.format(name), False: no.format(name)})


def _phrasings(rng: random.Random, verb: str, noun: str, arguments: list[str]) -> tuple[str, ...]:
    openers = rng.sample(WORDS["openers"], 5)
    prepositions = rng.sample(WORDS["prepositions"], 2 * len(arguments))
    found: dict[str, None] = {}
    while len(found) < PHRASINGS:
        clauses = []
        for position, argument in enumerate(arguments):
            patterns = [*prepositions[2 * position : 2 * position + 2], rng.choice(WORDS["labelled"])]
            word = argument.replace("_", " ")
            clauses.append(rng.choice(patterns).replace("{word}", word).replace("{}", f"{{{argument}}}"))
        rng.shuffle(clauses)
        clauses.insert(rng.choice([0, 0, 0, 1]), rng.choice(openers).replace("{verb}", verb).replace("{noun}", noun))
        text = clauses[0] + "".join(rng.choice([" ", " ", ", ", " and "]) + clause for clause in clauses[1:])
        found[text[0].upper() + text[1:] + rng.choice([".", ".", "?", "", " please"])] = None
    return tuple(found)


CATALOGUES["composed"] = composed
