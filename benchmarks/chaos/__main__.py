"""The command: references, runs under kills, the table."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from benchmarks.chaos import slurm, table
from benchmarks.chaos.campaign import FLAVOURS, Ground, Result, attack, judge, schedule


def main() -> int:
    """Exit code 0: every run ended equal, every cause was named rightly or unknown, every kill was done."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    options.add_argument("--kills", type=int, default=60)
    options.add_argument("--seed", type=int, default=0, help="which kind meets which place first")
    options.add_argument("--write", type=Path, metavar="FILE", help="write the table there, as Markdown")
    options.add_argument("--keep", action="store_true", help="keep the runs")
    said = options.parse_args()
    began = time.monotonic()
    was_up = slurm.up()
    slurm.heal()
    folder = Path(tempfile.mkdtemp(prefix="ftlib-chaos-"))
    ground = Ground(folder / "checkout")
    try:
        results, left = campaign(ground, said.kills, said.seed)
    except KeyboardInterrupt:
        return 130
    except slurm.Trouble as trouble:
        print(f"chaos: {trouble}\nThe runs are in {folder}", file=sys.stderr)
        return 1
    finally:
        slurm.heal()
        ground.cancel()
        if not was_up:
            slurm.down()
    text = table.markdown(results, left, minutes=(time.monotonic() - began) / 60, seed=said.seed)
    print(text)
    if said.write:
        said.write.write_text(text, encoding="utf-8")
    good = not left and all(r.equal and all(kill.right for kill in r.kills) for r in results)
    if good and not said.keep:
        shutil.rmtree(folder)
    else:
        print(f"The runs are in {folder}")
    return 0 if good else 1


def campaign(ground: Ground, kills: int, seed: int) -> tuple[list[Result], int]:
    """The killed runs' results, and how many kills could not be done."""
    random = Random(seed)
    todo = schedule(kills, random)
    flavours = [name for name in FLAVOURS if any(name == wish[0] for wish in todo)]
    references = {}
    for flavour in flavours:
        print(f"{flavour}: a run that nothing touches", flush=True)
        references[flavour] = run = ground.submit(flavour)
        if (ended := ground.finish(run)) != "completed":
            raise slurm.Trouble(f"the untouched run {run.name} is {ended}")
    results: list[Result] = []
    fruitless = 0
    while todo and fruitless < 2:
        flavour = todo[0][0]
        # One of each place a run; what a run could not meet comes again in the next.
        wanted: dict[tuple[str, str], tuple[str, str, str, str]] = {}
        for wish in todo:
            if wish[0] == flavour:
                wanted.setdefault((wish[2], wish[3]), wish)
        print(f"{flavour}: {len(wanted)} kills", flush=True)
        run, done = attack(ground, flavour, [wish[1:] for wish in wanted.values()], random)
        results.append(judge(ground, run, flavour, done, references[flavour]))
        met = {(kill.kind, kill.stage, kill.place) for kill in done}
        todo = [w for w in todo if not (w in wanted.values() and w[1:] in met)]
        fruitless = 0 if done else fruitless + 1
        last = results[-1]
        found = "; ".join(last.differences) or "no difference"
        print(f"  {last.state}, {'equal' if last.equal else 'NOT EQUAL'}: {found}", flush=True)
        for kill in (kill for kill in last.kills if not kill.right):
            print(f"  {kill.kind} at {kill.place} ({kill.stage}, life {kill.life}) was called {kill.cause!r}")
    return results, len(todo)


if __name__ == "__main__":
    sys.exit(main())
