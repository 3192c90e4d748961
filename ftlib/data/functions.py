"""What a function is, the catalogues written by hand (functions.yaml), and one composed at random."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ftlib.data.values import Value, invented_word, words

COUNT = 1500  # functions composed at random
PHRASINGS = 8


@dataclass(frozen=True)
class Argument:
    """Free values of a `kind` (a pool of ftlib.data.values), or `choices`: each value and the words that say it."""

    name: str
    kind: str = ""
    choices: Mapping[Value, str] | None = None


@dataclass(frozen=True)
class Function:
    """A function: its arguments in order, and question phrasings with every argument as `{name}`."""

    name: str
    arguments: tuple[Argument, ...]
    phrasings: tuple[str, ...]


@cache
def written() -> dict[str, tuple[Function, ...]]:
    """The catalogues by name: "natural", everyday functions to fine-tune on, and "unseen", which no training sees."""
    groups = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {
        group: tuple(
            Function(name, tuple(_argument(*item) for item in said["arguments"].items()), tuple(said["phrasings"]))
            for name, said in functions.items()
        )
        for group, functions in groups.items()
    }


def _argument(name: str, values: str | list[Value] | dict[Value, str]) -> Argument:
    if isinstance(values, str):
        return Argument(name, kind=values)
    return Argument(name, choices=values if isinstance(values, dict) else {value: str(value) for value in values})


@cache
def composed() -> tuple[Function, ...]:
    """`COUNT` functions that train the tiny base. There are too many to learn by heart: a model must learn to copy
    names from the example and values from the question."""
    rng = random.Random("composed functions")
    names: dict[str, tuple[str, str]] = {}
    while len(names) < COUNT:
        # Invented words keep the model from learning names by heart: it can only copy them.
        verb = rng.choice(words()["verbs"])
        noun = invented_word(rng, 1, 3) if rng.random() < 0.4 else rng.choice(words()["nouns"])
        names[f"{verb}_{noun}"] = (verb, noun)
    return tuple(_function(rng, name, verb, noun) for name, (verb, noun) in names.items())


def _function(rng: random.Random, name: str, verb: str, noun: str) -> Function:
    arguments: dict[str, Argument] = {}
    makers = [_free, *rng.choices([_free, _mode, _flag], [5, 3, 2], k=rng.choice([0, 1, 1, 2, 2]))]
    rng.shuffle(makers)
    for make in makers:
        argument = make(rng)
        arguments.setdefault(argument.name, argument)
    assert any(argument.kind for argument in arguments.values()), name
    return Function(name, tuple(arguments.values()), _phrasings(rng, verb, noun, list(arguments)))


def _free(rng: random.Random) -> Argument:
    kind = rng.choice(words()["kinds"])
    if kind in ("date", "time"):
        return Argument(f"{rng.choice(words()['when'])}_{kind}", kind)
    nouns = words()["text"] if kind in ("word", "phrase", "name", "handle", "code") else words()["number"]
    noun = invented_word(rng, 1, 3) if rng.random() < 0.3 else rng.choice(nouns)
    return Argument(f"{rng.choice(words()['qualifiers'])}_{noun}".strip("_"), kind)


def _mode(rng: random.Random) -> Argument:
    values = rng.sample(words()["choices"], rng.randint(2, 6))
    return Argument(rng.choice(words()["modes"]), choices={value: value for value in values})


def _flag(rng: random.Random) -> Argument:
    name = rng.choice(words()["flags"])
    yes, no = rng.choice([("{}", "not {}"), ("with {}", "without {}"), ("{} on", "{} off"), ("{}", "never {}")])
    return Argument(name, choices={True: yes.format(name), False: no.format(name)})


def _phrasings(rng: random.Random, verb: str, noun: str, arguments: list[str]) -> tuple[str, ...]:
    openers = rng.sample(words()["openers"], 5)
    prepositions = rng.sample(words()["prepositions"], 2 * len(arguments))
    found: dict[str, None] = {}
    while len(found) < PHRASINGS:
        clauses = []
        for position, argument in enumerate(arguments):
            patterns = [*prepositions[2 * position : 2 * position + 2], rng.choice(words()["labelled"])]
            word = argument.replace("_", " ")
            clauses.append(rng.choice(patterns).replace("{word}", word).replace("{}", f"{{{argument}}}"))
        rng.shuffle(clauses)
        clauses.insert(rng.choice([0, 0, 0, 1]), rng.choice(openers).replace("{verb}", verb).replace("{noun}", noun))
        text = clauses[0] + "".join(rng.choice([" ", " ", ", ", " and "]) + clause for clause in clauses[1:])
        found[text[0].upper() + text[1:] + rng.choice([".", ".", "?", "", " please"])] = None
    return tuple(found)
