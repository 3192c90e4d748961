"""`layers`: an architecture printed from its config alone: names, shapes and sizes of all that could be trained."""

from __future__ import annotations

import argparse
import json

from ftlib import modelfiles, recipe
from ftlib.plan import architectures
from ftlib.plan.architectures import BLOCK, Parameter
from jobs import wish as wishes


def layers(options: argparse.Namespace) -> int:
    """Print the layers of a recipe's model, as a table or as JSON."""
    changes, cluster_changes = recipe.parse_set(options.set)
    spec = recipe.load(wishes.RECIPES, options.model, changes)
    site = wishes.load_profile(options.cluster, cluster_changes)
    files = modelfiles.locate(
        spec.model.name, spec.model.revision, checkout=wishes.CHECKOUT, cache=site.cache_dir(wishes.CHECKOUT),
        internet=True,  # nothing is fetched: whether nodes have it does not matter here
    )  # fmt: skip
    found = architectures.parameters(files.config, spec.model.name)
    if not options.json:
        _print(spec.model.name, found)
        return 0
    rows = [
        {"name": _name(p), "shape": list(p.shape), "kind": p.kind, "copies": p.copies, "parameters": p.size * p.copies}
        for p in found
    ]
    print(json.dumps({"model": spec.model.name, "parameters": rows}, indent=1))
    return 0


def _name(parameter: Parameter) -> str:
    """The name with its range of blocks, as a pattern selects it."""
    return parameter.name.replace(BLOCK, f"0-{parameter.copies - 1}" if parameter.copies > 1 else "0")


def _print(model: str, found: tuple[Parameter, ...]) -> None:
    from rich import box
    from rich.table import Table

    from ftlib.report.plan import console

    table = Table(title=model, box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    total = sum(parameter.size * parameter.copies for parameter in found)
    table.add_column("parameter", "all", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("kind")
    table.add_column("parameters", f"{total:,}", justify="right")
    for parameter in found:
        shape = " × ".join(map(str, parameter.shape))
        table.add_row(_name(parameter), shape, parameter.kind, f"{parameter.size * parameter.copies:,}")
    out = console()
    out.print(table)
    linear = ", ".join(sorted({p.layer.rpartition(".")[2] for p in found if p.kind == "linear"}))
    out.print(f"Adapters can go on the linear layers: method.targets=[{linear}] or all-linear.", markup=False)
    if not any(parameter.kind == "head" for parameter in found):
        out.print("The head is the embedding itself (tied): no layer of its own.")
