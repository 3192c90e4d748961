"""Pools of free argument values, each value in exactly one split.

A value's split follows from a digest of its JSON text alone (80 % train, 10 % validation, 10 % test).
So a value seen in training is held out of the other splits for every function and every pool.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable
from functools import cache
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
Value = str | int | float | bool
SPLITS: tuple[Split, ...] = get_args(Split)


def words(text: str, separator: str = " ") -> list[str]:
    """The entries of a list written as text; a new line separates too."""
    return text.strip().replace("\n", separator).split(separator)


_CITIES = words("""
Amsterdam|Ankara|Athens|Atlanta, GA|Auckland|Austin, TX|Baltimore, MD|Bangkok|Barcelona|Belfast|Bergen|Berlin|Bogota
Bordeaux|Boston, MA|Bratislava|Brisbane|Bristol|Brussels|Bucharest|Budapest|Buenos Aires|Cairo|Calgary|Cape Town
Cardiff|Casablanca|Charlotte, NC|Chicago, IL|Cleveland, OH|Cologne|Copenhagen|Dakar|Dallas, TX|Damascus|Denver, CO
Detroit, MI|Doha|Dresden|Dubai|Dublin|Edinburgh|Florence|Frankfurt|Gainesville, FL|Geneva|Genoa|Ghent|Glasgow|Graz
Hamburg|Hanoi|Havana|Helsinki|Hong Kong|Honolulu, HI|Houston, TX|Istanbul|Jakarta|Jerusalem|Johannesburg|Kampala
Kansas City, MO|Kathmandu|Kingston|Krakow|Kuala Lumpur|Kyoto|Lagos|Las Vegas, NV|Lausanne|Leeds|Leipzig|Lima|Lisbon
Ljubljana|London|Los Angeles, CA|Lyon|Madison, WI|Madrid|Malaga|Manchester|Manila|Marseille|Melbourne|Memphis, TN
Mexico City|Miami, FL|Milan|Minneapolis, MN|Montreal|Mumbai|Munich|Nairobi|Nantes|Naples|Nashville, TN|New Delhi
New Orleans, LA|New York, NY|Nice|Oakland, CA|Orlando, FL|Osaka|Oslo|Ottawa|Palermo|Paris|Perth|Philadelphia, PA
Phoenix, AZ|Pittsburgh, PA|Portland, OR|Porto|Prague|Quebec|Quito|Reykjavik|Riga|Rio de Janeiro|Rome|Rotterdam
Salt Lake City, UT|Salzburg|San Diego, CA|San Francisco, CA|Santiago|Sao Paulo|Sarajevo|Seattle, WA|Seoul|Seville
Shanghai|Singapore|Skopje|Sofia|Split|Stockholm|Stuttgart|Sydney|Tallinn|Tampa, FL|Tangier|Tbilisi|Tokyo|Toronto
Toulouse|Trieste|Tucson, AZ|Tunis|Turin|Utrecht|Valencia|Vancouver|Venice|Verona|Vienna|Vilnius|Warsaw|Wellington
Winnipeg|Zagreb|Zurich""", "|")
_AREAS = words("East Greater North Old South West")
_FIRST = words("""
Ada Alan Amir Anna Bella Bruno Carla Chen Clara Daniel Diego Elena Emil Fatima Felix Grace Hana Hugo Ines Ivan Jonas
Julia Kira Lena Leo Linus Maria Marek Mina Nadia Noah Olga Omar Paula Priya Rosa Samir Sofia Tariq Vera""")
_LAST = words("""
Almeida Baker Bauer Costa Dubois Eriksen Fischer Garcia Haddad Ibrahim Jansen Kaya Kim Kowalski Larsen Lopez Meyer
Moreau Nakamura Novak Okafor Olsen Park Patel Petrov Quinn Rossi Sato Schmidt Silva Singh Tanaka Torres Usman Varga
Weber Wong Yilmaz Young Ziegler""")
_TITLE_A = words("""
Amber Autumn Blue Broken Crimson Distant Electric Endless Frozen Gentle Golden Hidden Hollow Iron Lonely Lost
Midnight Northern Paper Quiet Restless Scarlet Secret Silent Silver Velvet Violet Wandering Wild Winter""")
_TITLE_B = words("""
Bridge Carnival City Dream Echo Ember Forest Garden Harbor Highway Horizon Island Lantern Letter Light Mirror Moon
Mountain Ocean Promise Rain River Road Shadow Sky Song Star Storm Train Waltz""")
_DEED = words("""
bring call check clean collect finish fix mail order pack paint print read renew repair return review sign sort
update visit wash water write""")
_THING = words("""
the bicycle|the blue folder|the budget|the car keys|the contract|the curtains|the dentist|the exam papers
the fish tank|the garden tools|the guest list|the insurance form|the kitchen sink|the landlord|the lease
the library books|the long report|the map|the new plants|the old laptop|the passport|the photo album|the piano
the recipe book|the rent|the roof|the slides|the spare tire|the tax letter|the tickets|the travel plan
the wedding card|the window|the winter coat""", "|")
_ONSETS = words("b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr th sh")
_CODAS = "nrstlmxkd"


def split_of(value: Value) -> Split:
    """The one split in which a free value may stand. Equal numbers have equal splits (5 and 5.0)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    share = zlib.crc32(json.dumps(value).encode()) % 10
    return "train" if share < 8 else "validation" if share == 8 else "test"


@cache
def pool(kind: str, split: Split) -> tuple[Value, ...]:
    """The distinct values of one kind that belong to a split, in a fixed order."""
    return tuple(value for value in _pools()[kind] if split_of(value) == split)


@cache
def _pools() -> dict[str, tuple[Value, ...]]:
    rng = random.Random("value pools")
    months = [f"{year}-{month:02}" for year in (2025, 2026, 2027) for month in range(1, 13)]
    kinds: dict[str, Iterable[Value]] = {
        "city": [*_CITIES, *_product(_AREAS, _CITIES)],
        "person": _product(_FIRST, _LAST),
        "title": _product(_TITLE_A, _TITLE_B) + _product(_TITLE_B, _TITLE_A),
        "errand": _product(_DEED, _THING),
        "date": [f"{month}-{day:02}" for month in months for day in range(1, 29)],
        "time": [f"{hour:02}:{minute:02}" for hour in range(24) for minute in range(60)],
        "ticker": [_letters(rng, 3, 4).upper() for _ in range(900)],
        "code": [f"{_letters(rng, 2, 3).upper()}{rng.randrange(1000, 100000)}" for _ in range(2000)],
        "word": [invented_word(rng, 2, 3) for _ in range(4000)],
        "phrase": [" ".join(invented_word(rng, 1, 3) for _ in range(rng.randint(2, 3))) for _ in range(6000)],
        "name": [" ".join(invented_word(rng, 1, 3).title() for _ in range(rng.randint(1, 2))) for _ in range(6000)],
        "handle": [f"{invented_word(rng, 1, 3)}{rng.choice('-_.')}{rng.randrange(10, 1000)}" for _ in range(3000)],
        "small": range(2, 120),
        "count": range(2, 400),
        "large": range(400, 20000, 7),
        "tenths": [k / 10 for k in range(21, 1500) if k % 10],
        "cents": [k / 100 for k in range(101, 30000, 7) if k % 10],
        "amount": [*range(10, 3000, 5), *(k / 2 for k in range(21, 2000, 2))],
    }
    return {kind: tuple(dict.fromkeys(values)) for kind, values in kinds.items()}


def _product(left: Iterable[str], right: list[str]) -> list[str]:
    return [f"{a} {b}" for a in left for b in right]


def _letters(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(least, most)))


def invented_word(rng: random.Random, least: int, most: int) -> str:
    """An invented word of some syllables: copying it cannot be learned by heart."""
    syllables = []
    for _ in range(rng.randint(least, most)):
        coda = rng.choice(_CODAS) if rng.random() < 0.5 else ""
        syllables.append(rng.choice(_ONSETS) + rng.choice("aeiou") + coda)
    return "".join(syllables)
