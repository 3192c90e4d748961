"""Functions composed at random: verb x noun, one to three typed arguments, varied carrier phrases.

They train the tiny base model. Their breadth is the point: too many to learn by heart, so that a model must learn to
copy the function and the argument names from the example and the values from the question.
"""

from __future__ import annotations

import random
from functools import cache

from ftlib.data.functions import Argument, Function
from ftlib.data.values import invented_word, words

COUNT = 1500
PHRASINGS = 8

_VERBS = words("""
adjust allocate archive assign attach cancel capture classify clone close collect combine compare compile connect
create deliver deploy describe draft estimate evaluate export fetch filter forward generate import inspect install
launch list load lock mark measure merge modify monitor move open plan post prepare print publish query rank
register remove rename repair report request reset resize restore save scan select share sort split start stop store
submit summarize suspend switch sync tag test trace transfer update upload validate verify watch""")
_NOUNS = words("""
account album alert archive asset badge batch beacon bill board bottle branch bridge bucket cabinet camera card
catalog channel chart claim cluster contract course crate customer dataset device diagram display document domain
drone engine event experiment farm field figure file filter fleet folder form gallery garden gate group image index
invoice job journal kit lamp layer ledger lens letter license lot machine magazine map member metric mission model
monitor motor network note notebook office orchard panel parcel patch path permit pipeline plant policy pool portal
printer profile project pump queue receipt record region report request robot roster route sample schedule schema
sensor server session shelf signal site slot station store stream survey table tank team template ticket tool tower
track truck tunnel valve vault vehicle version video voucher wallet warehouse widget window workflow zone""")
_QUALIFIERS = ["", "", "", "base", "final", "first", "last", "main", "max", "min", "new", "old", "second", "target"]
_TEXT = words("""
alias area author brand category caption client comment contact department district folder group host keyword label
location maker name note owner partner place project reason room section sender series source station street subject
supplier team theme topic town user vendor village""")
_NUMBER = words("""
amount angle balance budget capacity cost count delay depth distance duration factor height length level limit load
offset pressure price quantity radius range rate ratio score size span speed step stock temperature threshold total
value volume weight width""")
_KINDS = words("word phrase name name handle code count count large tenths cents amount date time")
_WHEN = ["begin", "deadline", "delivery", "due", "end", "event", "launch", "pickup", "release", "start"]
_MODES = words("color format kind language method mode priority scope shape state style type")
_CHOICES = words("""
active basic big black blue bright brief central closed cold compact cubic daily dark deep direct double dry early
east fast fine flat full global green hard heavy hourly inner large late left light linear local long loose low
manual monthly narrow north outer partial plain private public quick raw red remote right rough round secure sharp
short silent simple slow small smooth soft solid south square static steep strong thick thin tight upper warm weekly
west white wide yellow""")
_FLAGS = words("""
anonymous archived backup cached compressed detailed encrypted force hidden insured locked notify permanent pinned
preview recursive shared sorted strict tracked urgent verbose visible waterproof""")

_OPENERS = [
    "{verb} the {noun}", "{verb} a {noun}", "please {verb} this {noun}", "can you {verb} the {noun}",
    "I want to {verb} a {noun}", "I need to {verb} the {noun}", "could you {verb} one {noun}",
    "help me {verb} our {noun}", "we have to {verb} the {noun} now", "what is the {noun}", "how much is the {noun}",
    "where is the {noun}", "give me the {noun}", "show me a {noun}", "find the {noun}", "tell me about the {noun}",
    "I am looking for a {noun}", "is there any {noun}", "look up the {noun}", "my {noun} is ready, {verb} it",
    "let us {verb} it", "do {verb} it", "it is time to {verb}", "{noun}, please", "which {noun} can I {verb}",
    "don't forget the {noun}", "{verb}", "{noun}", "make it a {noun}", "put the {noun}",
]  # fmt: skip
_PREPOSITIONS = [
    "for {}", "from {}", "to {}", "in {}", "at {}", "on {}", "by {}", "with {}", "of {}", "under {}", "near {}",
    "using {}", "about {}", "until {}", "after {}", "into {}", "as {}", "called {}", "named '{}'", "({})", ": {}",
    "before {}", "it is {}", "that is {}", "I have {}", "I need {}", "and {}", "over {}", "via {}", "like {}",
    "against {}", "{}",
]  # fmt: skip
_LABELLED = [
    "{word} {}", "with {word} {}", "the {word} is {}", "a {word} of {}", "{word}: {}", "set {word} to {}",
    "{} {word}",
]  # fmt: skip


@cache
def composed() -> tuple[Function, ...]:
    """`COUNT` functions of distinct names; every one has `PHRASINGS` phrasings and at least one free argument."""
    rng = random.Random("composed functions")
    names: dict[str, tuple[str, str]] = {}
    while len(names) < COUNT:
        # Invented words keep the model from learning names by heart: it can only copy them.
        verb, noun = rng.choice(_VERBS), invented_word(rng, 1, 3) if rng.random() < 0.4 else rng.choice(_NOUNS)
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
    kind = rng.choice(_KINDS)
    if kind in ("date", "time"):
        return Argument(f"{rng.choice(_WHEN)}_{kind}", kind)
    nouns = _TEXT if kind in ("word", "phrase", "name", "handle", "code") else _NUMBER
    noun = invented_word(rng, 1, 3) if rng.random() < 0.3 else rng.choice(nouns)
    return Argument(f"{rng.choice(_QUALIFIERS)}_{noun}".strip("_"), kind)


def _mode(rng: random.Random) -> Argument:
    values = rng.sample(_CHOICES, rng.randint(2, 6))
    return Argument(rng.choice(_MODES), choices={value: value for value in values})


def _flag(rng: random.Random) -> Argument:
    name = rng.choice(_FLAGS)
    yes, no = rng.choice([("{}", "not {}"), ("with {}", "without {}"), ("{} on", "{} off"), ("{}", "never {}")])
    return Argument(name, choices={True: yes.format(name), False: no.format(name)})


def _phrasings(rng: random.Random, verb: str, noun: str, arguments: list[str]) -> tuple[str, ...]:
    openers = rng.sample(_OPENERS, 5)
    prepositions = rng.sample(_PREPOSITIONS, 2 * len(arguments))
    found: dict[str, None] = {}
    while len(found) < PHRASINGS:
        clauses = []
        for position, argument in enumerate(arguments):
            patterns = [*prepositions[2 * position : 2 * position + 2], rng.choice(_LABELLED)]
            word = argument.replace("_", " ")
            clauses.append(rng.choice(patterns).replace("{word}", word).replace("{}", f"{{{argument}}}"))
        rng.shuffle(clauses)
        clauses.insert(rng.choice([0, 0, 0, 1]), rng.choice(openers).replace("{verb}", verb).replace("{noun}", noun))
        text = clauses[0] + "".join(rng.choice([" ", " ", ", ", " and "]) + clause for clause in clauses[1:])
        found[text[0].upper() + text[1:] + rng.choice([".", ".", "?", "", " please"])] = None
    return tuple(found)
