"""SweepSpec: a YAML file of jobs/sweeps/ and the points it stands for. Pure; nothing is queued here."""

import itertools
import math
import random
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ftlib.errors import InputError, nearest, unknown
from ftlib.recipe import names, read_yaml
from ftlib.spec import Model, RunSpec, leaves, validate

Point = dict[str, Any]  # dotted field of RunSpec -> value
# Each of evaluation.json's scores, and whether more of it is better.
METRICS = {"perplexity": False, "exact": True, "function": True, "valid_json": True}
# Of a space with few values the same point is drawn again and again: how often before we stop.
MOST_DRAWS = 50


class Space(Model):
    """What a random value is drawn from: a list of choices, or one of the ranges (both ends included)."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="One of these")
    uniform: tuple[float, float] | None = Field(None, description="Between two numbers")
    log: tuple[float, float] | None = Field(None, description="Between two numbers, its logarithm uniform")
    integers: tuple[int, int] | None = Field(None, description="A whole number between two")

    @model_validator(mode="before")
    @classmethod
    def _list_is_choices(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one(self) -> "Space":
        said = self.model_dump(exclude_none=True)
        if len(said) != 1:
            raise ValueError(f"give exactly one of {', '.join(Space.model_fields)}; found {', '.join(said) or 'none'}")
        for low, high in filter(None, (self.uniform, self.log, self.integers)):
            if low > high or (self.log and low <= 0):
                raise ValueError(f"[{low}, {high}] is no range" + (" of positive numbers" if self.log else ""))
        return self

    def draw(self, chance: random.Random) -> Any:
        """One value; three significant digits are enough for a person to read and say again."""
        if self.choices:
            return chance.choice(self.choices)
        if self.integers:
            return chance.randint(*self.integers)
        if self.log:
            return float(f"{math.exp(chance.uniform(*map(math.log, self.log))):.3g}")
        assert self.uniform
        return float(f"{chance.uniform(*self.uniform):.3g}")


class RandomSpec(Model):
    """Points drawn at random; the same seed draws the same."""

    points: int = Field(ge=1, description="How many")
    seed: int = Field(0, ge=0, description="Seed of the draws")
    fields: dict[str, Space] = Field(min_length=1, description="Recipe field -> what its values are drawn from")


class SweepSpec(Model):
    """One of grid, list and random over any fields of a recipe."""

    description: str = Field("", description="One line for people")
    grid: dict[str, tuple[Any, ...]] | None = Field(None, description="Every combination of these values")
    list: tuple[Point, ...] | None = Field(None, description="These points")
    random: RandomSpec | None = Field(None, description="Points drawn at random")
    metric: Literal["perplexity", "exact", "function", "valid_json"] = Field(
        "perplexity", description="Score of the tuned model by which the report sorts")
    at_once: int | None = Field(None, ge=1, description="Most points of the sweep in one stage at the same time")

    @model_validator(mode="after")
    def _one_kind(self) -> "SweepSpec":
        kinds = [kind for kind in ("grid", "list", "random") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of grid, list and random; found {' and '.join(kinds) or 'none'}")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The swept fields, in the file's order."""
        if self.random:
            return tuple(self.random.fields)
        return tuple(dict.fromkeys(field for point in self.list or (self.grid or {},) for field in point))

    def count(self) -> int:
        """How many points there are, duplicates counted; none is made."""
        if self.grid is not None:
            return math.prod(len(values) for values in self.grid.values()) if self.grid else 0
        return len(self.list or ()) if self.random is None else self.random.points

    def points(self) -> tuple[Point, ...]:
        """Every point. Random ones differ from each other as long as the space has enough."""
        if self.grid is not None:
            return tuple(dict(zip(self.grid, row, strict=True)) for row in itertools.product(*self.grid.values()))
        if self.random is None:
            return self.list or ()
        chance, found = random.Random(self.random.seed), dict[str, Point]()
        for _ in range(MOST_DRAWS * self.random.points):
            point = {field: space.draw(chance) for field, space in self.random.fields.items()}
            found.setdefault(repr(point), point)
            if len(found) == self.random.points:
                break
        return tuple(found.values())


def load(folder: Path, name: str) -> SweepSpec:
    """The sweep `name` of a folder of YAML files; InputError with every problem at once."""
    if name not in names(folder):
        raise InputError(unknown("SWEEP", name, names(folder)))
    where = f"sweep {name}"
    spec = validate(SweepSpec, read_yaml(folder / f"{name}.yaml"), where)
    allowed = [field for field in leaves(RunSpec) if field not in ("recipe", "description")]
    problems = [
        f"{where}: {field!r} is no field of a recipe.{_meant(field, allowed)} make schema prints them all"
        for field in spec.fields
        if field not in allowed]
    empty = [field for field, values in (spec.grid or {}).items() if not values]
    if spec.count() == 0:
        problems.append(f"{where}: expands to no point" + (f": {', '.join(empty)} has no values" if empty else ""))
    if problems:
        raise InputError(problems)
    return spec


def _meant(field: str, allowed: list[str]) -> str:
    same = [name for name in allowed if name.rpartition(".")[2] == field.rpartition(".")[2]]
    return f" Did you mean {same[0]}?" if same else nearest(field, allowed)


def words(point: Point) -> str:
    """A point as SET= would say it: "optim.lr=0.001 method.rank=8"."""
    return " ".join(f"{field}={value}" for field, value in point.items())
