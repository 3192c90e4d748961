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


VALUES = {
    "model": "recipe (default: %(default)s)",
    "data": "JSONL or JSON file of examples",
    "cluster": "profile (default: cluster.yaml's, else this one)",
    "set": 'changes: "optim.lr=1e-4 data.limit=1000"',
    "nodes": "nodes of the training (SET resources.nodes)",
    "run": "name of a run",
    "sweep": "name of a sweep, or a file of jobs/sweeps/",
    "stage": "prepare, train, export or evaluate",
    "venv": "folder of the virtual environment",
    "stamp": "file that says that the packages are whole",
}
DEFAULTS = {"model": DEFAULT_MODEL, "set": ""}
FLAGS = {
    "dry_run": "print the sbatch scripts alone",
    "new": "another run of the same wish",
    "before": "what can be seen from here, no job",
    "json": "for programs",
    "watch": "draw again until all has ended",
    "follow": "go on as it grows, in every later life",
}


def parser() -> Parser:
    """All commands and options."""
    top = Parser(prog="python -m jobs", description="Fine-tune language models on a Slurm cluster, or here.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, module: str, words: str, *options: str) -> None:
        """`module`: the one of jobs/ that has a function of that name. An option with ! must be said."""
        sub = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        sub.set_defaults(module=module)
        for option in options:
            key = option.rstrip("!")
            said = f"--{key.replace('_', '-')}"
            if key in FLAGS:
                sub.add_argument(said, action="store_true", help=FLAGS[key])
            else:
                sub.add_argument(said, default=DEFAULTS.get(key), required=key != option, help=VALUES[key])

    wish = ("model", "data", "cluster", "set", "nodes")
    command("submit", "submit", "queue prepare, train, export and evaluate (or run them here)", *wish, "dry_run", "new")
    command("plan", "submit", "what a run would need, take and cost; queues nothing", *wish, "json")
    command("env", "smoke", "check packages, driver, GPU and storage on a GPU node", "cluster", "set", "new", "before")
    command("smoke", "smoke", "ten real steps on a node, and what they tell of the whole run", *wish)
    fetched = "bring a recipe's model and dataset from the Hub to where jobs look for them"
    command("fetch", "fetch", fetched, "model", "cluster", "set")
    command("sweep", "sweep", "queue every point of a sweep, in as few arrays as fit", "sweep!", *wish, "dry_run")
    command("report", "sweep", "a sweep's points by their score, as a table, CSV and plot", "sweep!", "json")
    built = "build the image of this checkout's locks, where it is not there yet"
    command("image", "image", built, "cluster", "set")
    installed = "install the training packages in a CPU job; exit 3: the profile has them installed here"
    command("packages", "packages", installed, "venv!", "stamp!", "cluster", "set")
    command("layers", "look", "the names, shapes and sizes of a model's layers", "model", "cluster", "set", "json")
    command("status", "look", "every sweep and run, or one, and what it is doing", "run", "sweep", "json", "watch")
    command("logs", "logs", "the log of the newest life, or of a stage's", "run!", "stage", "follow")
    command("why", "look", "what happened in each life of a run, and what to do now", "run!")
    command("verify", "look", "check a run's checkpoints; name the one it would go on from", "run!")
    command("cancel", "runs", "end a run's (or a sweep's) jobs; they stay ended until they are resumed", "run", "sweep")
    missing = "queue what is missing of a run or a sweep; SET= of a cluster"
    command("resume", "runs", missing, "run", "sweep", "nodes", "set")
    command("schema", "", "JSON Schema of a recipe, for editors")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is told in words, without a traceback."""
    try:
        return _dispatch(_parse(sys.argv[1:] if argv is None else argv))
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
        text = f"{options.command}: unknown option {{!r}}. Allowed: {', '.join(valid)}.{{}}"
        raise InputError([text.format(word, nearest(word, valid)) for word in unknown])
    return options


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "schema":
        from ftlib.spec import RunSpec

        print(json.dumps(RunSpec.model_json_schema(), indent=1))
        return 0
    if getattr(options, "run", None) and getattr(options, "sweep", None):
        raise InputError(f"{options.command}: RUN and SWEEP exclude each other; say one of them")
    if options.command in ("cancel", "resume") and not (options.run or options.sweep):
        raise InputError(f"{options.command}: RUN= or SWEEP= is missing; make status names what there is")
    if options.command == "resume" and options.sweep and (options.nodes or options.set):
        raise InputError("resume: NODES= and SET= are for one run; the points of a sweep keep theirs")
    if options.command != "resume" and (nodes := getattr(options, "nodes", None)):
        options.set = f"{options.set} {shlex.quote(f'resources.nodes={nodes}')}".strip()
    where = "sweep" if options.module == "runs" and options.sweep else options.module
    module = importlib.import_module(f"jobs.{where}")
    run: Callable[[argparse.Namespace], int] = getattr(module, options.command)
    return run(options)
