"""The command line behind the Makefile: `python -m jobs COMMAND`. Light imports only; heavy work is in the stages."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

from ftlib.errors import FtError, InputError, nearest

DEFAULT_MODEL = "tiny"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: exit 64, with the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}. {self.prog} --help lists what there is")


def parser() -> Parser:
    """All commands and options."""
    top = Parser(prog="python -m jobs", description="Fine-tune language models on a Slurm cluster, or here.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, words: str, *options: str) -> None:
        sub = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        for option in options:
            OPTIONS[option](sub)

    wish = ("model", "data", "cluster", "set", "nodes")
    command("submit", "queue prepare, train, export and evaluate (or run them here)", *wish, "dry_run", "new")
    command("plan", "what a run would need, take and cost; queues nothing", *wish, "json")
    command("env", "check packages, driver, GPU and storage on a GPU node", "cluster", "set", "new", "before")
    command("smoke", "ten real steps on a node, and what they tell of the whole run", *wish)
    command("sweep", "queue every point of a sweep, in as few arrays as fit", "sweep!", *wish, "dry_run")
    command("report", "a sweep's points by their score, as a table, CSV and plot", "sweep!", "json")
    command("image", "build the image of this checkout's locks, where it is not there yet", "cluster", "set", "chosen")
    command("layers", "the names, shapes and sizes of a model's layers", "model", "cluster", "set", "json")
    command("status", "every sweep and run, or one, and what it is doing", "run", "sweep", "json", "watch")
    command("logs", "the log of the newest life, or of a stage's", "run!", "stage", "follow")
    command("why", "what happened in each life of a run, and what to do now", "run!")
    command("verify", "check a run's checkpoints; name the one it would go on from", "run!")
    command("cancel", "end a run's (or a sweep's) jobs; they stay ended until they are resumed", "run", "sweep")
    command("resume", "queue what is missing of a run or a sweep; SET= of a cluster", "run", "sweep", "nodes", "set")
    command("schema", "JSON Schema of a recipe, for editors")
    return top


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], object]] = {
    "model": lambda p: p.add_argument("--model", default=DEFAULT_MODEL, help="recipe (default: %(default)s)"),
    "data": lambda p: p.add_argument("--data", help="JSONL or JSON file of examples"),
    "cluster": lambda p: p.add_argument("--cluster", help="profile (default: cluster.yaml's, else this one)"),
    "set": lambda p: p.add_argument("--set", default="", help='changes: "optim.lr=1e-4 data.limit=1000"'),
    "nodes": lambda p: p.add_argument("--nodes", help="nodes of the training (SET resources.nodes)"),
    "dry_run": lambda p: p.add_argument("--dry-run", action="store_true", help="print the sbatch scripts alone"),
    "new": lambda p: p.add_argument("--new", action="store_true", help="another run of the same wish"),
    "before": lambda p: p.add_argument("--before", action="store_true", help="what can be seen from here, no job"),
    "chosen": lambda p: p.add_argument("--chosen", action="store_true", help="only tell whether one is wanted: 0 or 1"),
    "json": lambda p: p.add_argument("--json", action="store_true", help="for programs"),
    "run": lambda p: p.add_argument("--run", help="name of a run"),
    "run!": lambda p: p.add_argument("--run", required=True, help="name of a run"),
    "sweep": lambda p: p.add_argument("--sweep", help="name of a sweep"),
    "sweep!": lambda p: p.add_argument("--sweep", required=True, help="a file of jobs/sweeps/, or a sweep's name"),
    "stage": lambda p: p.add_argument("--stage", help="prepare, train, export or evaluate"),
    "watch": lambda p: p.add_argument("--watch", action="store_true", help="draw again until all has ended"),
    "follow": lambda p: p.add_argument("--follow", action="store_true", help="go on as it grows, in every later life"),
}


# Where each command is; the others are in jobs/look.py.
MODULES = {
    "submit": "submit", "plan": "submit", "env": "smoke", "smoke": "smoke", "sweep": "sweep", "report": "sweep",
    "layers": "layers", "logs": "logs", "cancel": "runs", "resume": "runs", "image": "image",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is told in words, without a traceback."""
    try:
        words = sys.argv[1:] if argv is None else argv
        options = _parse(words)
        return _dispatch(options)
    except FtError as error:
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _parse(words: list[str]) -> argparse.Namespace:
    top = parser()
    subparsers = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    if words and not words[0].startswith("-") and words[0] not in subparsers.choices:
        known = list(subparsers.choices)
        raise InputError(f"unknown command {words[0]!r}. Allowed: {', '.join(known)}.{nearest(words[0], known)}")
    options, unknown = top.parse_known_args(words)
    if unknown:
        valid = [name for a in subparsers.choices[options.command]._actions for name in a.option_strings]
        raise InputError(
            [
                f"{options.command}: unknown option {word!r}. Allowed: {', '.join(valid)}.{nearest(word, valid)}"
                for word in unknown
            ]
        )
    return options


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "schema":
        from ftlib.spec import RunSpec

        print(json.dumps(RunSpec.model_json_schema(), indent=1))
        return 0
    if options.command in ("cancel", "resume") and not (options.run or options.sweep):
        raise InputError(f"{options.command}: RUN= or SWEEP= is missing; make status names what there is")
    if options.command == "resume" and options.sweep and (options.nodes or options.set):
        raise InputError("resume: NODES= and SET= are for one run; the points of a sweep keep theirs")
    if options.command != "resume" and (nodes := getattr(options, "nodes", None)):
        options.set = f"{options.set} {shlex.quote(f'resources.nodes={nodes}')}".strip()
    where = MODULES.get(options.command, "look")
    module = importlib.import_module(f"jobs.{'sweep' if where == 'runs' and options.sweep else where}")
    run: Callable[[argparse.Namespace], int] = getattr(module, options.command)
    return run(options)
