"""A login node whose sbatch, squeue, sacct, scancel and scontrol are this file: arrays, limits and comments, no nodes.

As a program it is whichever of them it is called as; its queue is one JSON file, $QUEUE.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ACTIVE = ("PENDING", "RUNNING")
# Stands for the jobs' interpreter: a stage is a second of sleep that saves when it is warned; all else is real.
# While a file `held` lies beside it no prepare ends, a run with a file `long` trains until it is warned, and one with a
# file `slow` does the same in the stage that the file names. run/pids/STAGE-ATTEMPT shows that a stage is at work.
QUICK = """#!/bin/bash
[ "$3" = jobs.stage ] || [ "$3" = submitit.core._submit ] || exec {python} "$@"
run=$FT_RUN stage=$FT_STAGE
say() {{ printf '%s\\n' "$1" >"$run/outcomes/.q" && mv "$run/outcomes/.q" "$run/outcomes/$stage-$FT_LIFE"; }}
trap 'say "75 interrupted (preemption), saved"; exit 75' TERM USR2
while [ $stage = prepare ] && [ -e {folder}/held ]; do sleep 0.2; done
seconds={seconds}
echo "quick: $stage"
mkdir -p "$run/pids" && touch "$run/pids/$stage-$FT_LIFE"
[ "$stage-$FT_LIFE" != "$(cat "$run/slow" 2>/dev/null)-1" ] || seconds=300
[ "$stage-$FT_LIFE" != train-1 ] || [ ! -e "$run/long" ] || seconds=300
sleep $seconds & wait $!
[ ! -e "$run/fails" ] || [ $stage != train ] || {{ say "1 it always fails"; exit 1; }}
case $stage in
prepare) echo '{{"dataset": "x", "train": {{"rows": 8}}}}' >"$run/prepared.json"; {python} -c "
import sys; from pathlib import Path; from ftlib.rundir import RunDir; from ftlib.sweepdir import share_prepared
run = RunDir(Path(sys.argv[1])); share_prepared(run, run.siblings())" "$run" ;;
evaluate) perplexity=$(($(cksum <"$run/spec.json" | cut -d' ' -f1) % 100))
  echo '{{"tuned": {{"perplexity": '$perplexity'}}}}' >"$run/evaluation.json" ;;
esac
say "0 done"
"""


def quick_python(folder: Path, seconds: float = 1) -> Path:
    """The stand-in for an interpreter whose stages take `seconds`; a run with a file `fails` fails in train."""
    file = folder / "python"
    file.write_text(QUICK.format(python=shlex.quote(sys.executable), seconds=seconds, folder=shlex.quote(str(folder))))
    file.chmod(0o755)
    return file


class Queue:
    """Arrays as sbatch got them, and each task's state."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.arrays: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def save(self) -> None:
        self.file.write_text(json.dumps(self.arrays))

    def tasks(self, *states: str) -> list[tuple[str, str]]:
        """(array, index) of every task in one of the states; an index of "" for a job that is no array."""
        return [(a, i) for a, job in self.arrays.items() for i, state in job["tasks"].items() if state in states]

    def of(self, stage: str) -> list[str]:
        """The arrays that run a stage (alone, or with another: export+evaluate), oldest first."""
        names = {array: job["comment"].split(" ")[2] for array, job in self.arrays.items()}
        return [array for array, name in names.items() if stage == name or stage in name.split("+")]


def main(name: str, words: list[str]) -> int:
    queue = Queue(Path(os.environ["QUEUE"]))
    return {"sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel, "scontrol": scontrol}[name](
        queue, words
    )


def sbatch(queue: Queue, words: list[str]) -> int:
    script = Path(words[-1]).read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))
    said = {key: value.strip("'") for key, value in options.items()}
    indices = list(expanded(said["array"].partition("%")[0])) if "array" in said else [""]
    if any(index and int(index) >= int(os.environ.get("MAX_ARRAY", "1001")) for index in indices):
        return refuse("Invalid job array specification")
    if len(queue.tasks(*ACTIVE)) + len(indices) > int(os.environ.get("MAX_SUBMIT", "1000000")):
        return refuse("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)")
    number = str(1000 + len(queue.arrays))
    queue.arrays[number] = {
        "comment": said["comment"],
        "dependency": said.get("dependency", ""),
        "array": said.get("array", ""),
        "script": script,
        "tasks": dict.fromkeys(indices, "PENDING"),
    }
    queue.save()
    if os.environ.get("KILL_AT") == str(len(queue.arrays)):
        os.kill(os.getppid(), 9)
    print(f"Submitted batch job {number}")
    return 0


def refuse(why: str) -> int:
    print(f"sbatch: error: Batch job submission failed: {why}", file=sys.stderr)
    return 1


def expanded(text: str) -> Iterable[str]:
    for part in text.split(","):
        low, _, high = part.partition("-")
        yield from map(str, range(int(low), int(high or low) + 1))


def squeue(queue: Queue, words: list[str]) -> int:
    form = next(word for word in words if word.startswith("--format=")).removeprefix("--format=")
    for array, job in queue.arrays.items():
        for index, state in job["tasks"].items():
            values = {"%i": f"{array}_{index}" if index else array, "%T": state, "%r": "None", "%k": job["comment"]}
            print(re.sub(r"%[A-Za-z]", lambda code, values=values: values.get(code[0], "N/A"), form))
    return 0


def sacct(queue: Queue, words: list[str]) -> int:
    return 0


def scancel(queue: Queue, words: list[str]) -> int:
    for word in words:
        array, _, index = word.partition("_")
        tasks = queue.arrays[array]["tasks"]
        for one in [index] if index else list(tasks):
            tasks[one] = "CANCELLED" if tasks[one] in ACTIVE else tasks[one]
    queue.save()
    return 0


def scontrol(queue: Queue, words: list[str]) -> int:
    if words[1:2] == ["config"]:
        print("ClusterName = local-slurm")
    return 0 if words[1:2] == ["config"] else 1


class Login:
    """A copied checkout on such a login node."""

    def __init__(self, checkout: Path, place: Path, **limits: str) -> None:
        self.checkout, self.file = checkout, place / "queue.json"
        tools = place / "bin"
        tools.mkdir()
        for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun"):
            program = shlex.join([sys.executable, "-SE", __file__, name])
            (tools / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
            (tools / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env = {**kept, "PATH": f"{tools}:{os.environ['PATH']}", "QUEUE": str(self.file), **limits}

    @property
    def queue(self) -> Queue:
        return Queue(self.file)

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=self.checkout, env={**self.env, **environment}, text=True,
            capture_output=True, timeout=300,
        )  # fmt: skip

    def jobs(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "jobs", *words, **environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
