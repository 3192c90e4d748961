"""The arrays of a sweep: one per job of the chain and resource shape. Tasks find their run by a link under their index.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftlib.errors import FtError
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.runs import attempts, comments, events
from ftlib.runs.comments import AND
from ftlib.runs.events import Intended, Submitted
from ftlib.runs.ledger import ARRAYS, IMAGE, STAGES
from ftlib.slurm import batch, container, requests, retry
from ftlib.sweepdir import SweepDir
from jobs.chain import STAGE_MODULE, ModuleExecutor
from jobs.points import Chunk, Need, chunks, threaded

NOTHING_KNOWN: dict[str, requests.Memory] = {}


ORDER = (IMAGE, *STAGES)


@dataclass
class Fed:
    """What was done about a sweep's points."""

    queued: Counter[str] = field(default_factory=Counter)  # a job's stages (export+evaluate) -> tasks
    arrays: Counter[str] = field(default_factory=Counter)  # the same -> sbatch calls
    waiting: int = 0  # points for which there is no room yet
    told: dict[str, list[str]] = field(default_factory=dict)  # why nothing is queued -> runs

    def words(self) -> str:
        """A line for each thing that was done or left."""
        parts = [f"{name} {count} in {self.arrays[name]} array{'s' * (self.arrays[name] > 1)}"
                 for name, count in self.queued.items()]  # fmt: skip
        lines = ["Queued: " + ", ".join(parts) if parts else "Nothing was queued."]
        lines += [f"{len(runs):5} {why}" for why, runs in sorted(self.told.items())]
        if self.waiting:
            lines.append(f"{self.waiting:5} wait for room in the queue; the feeder job queues them")
        return "\n".join(lines)


def record(
    run: RunDir, jobs: dict[str, str], nonces: dict[str, str], *, automatic: bool = False,
    prepared_by: str | None = None, memory: Mapping[str, requests.Memory] = NOTHING_KNOWN,
) -> None:  # fmt: skip
    """Write into the run's own events under which jobs, whose comments hold which nonces, its stages are queued.

    memory: what the job of a stage requests.
    """
    known = attempts.read(run.lives)
    submitted = (
        Submitted(
            stage=stage, job_id=job, nonce=nonces[stage], after_attempt=len(known.get(stage, ())), automatic=automatic,
            prepared_by=prepared_by if stage == "prepare" else None,
            mem_mib=memory.get(stage, requests.UNKNOWN).requested_mib,
            node_mem_mib=memory.get(stage, requests.UNKNOWN).node_mib,
        )
        # What waits for another is recorded after it.
        for stage, job in sorted(jobs.items(), key=lambda pair: ORDER.index(pair[0]))
    )  # fmt: skip
    run.record(*submitted)


class Arrays:
    """The sbatch calls of one feeding."""

    def __init__(self, sweep: SweepDir, profile: ClusterProfile, fed: Fed, at_once: int | None, cache: Path) -> None:
        self.sweep, self.profile, self.fed, self.at_once, self.cache = sweep, profile, fed, at_once, cache
        self.image: str | None = None  # the job that builds the image, where it is not there yet
        self.active: dict[str, set[str]] = {}  # stage -> arrays, or jobs, that are queued or running
        self.patience_s = retry.SUBMIT_S  # how long a busy controller is asked to take each array
        self.middle: list[str] = []  # tasks whose end means that there is room again

    def queue(self, needs: list[Need]) -> FtError | None:
        """Queue all; the error where sbatch refused, what was queued before it being written down."""
        parts = [(chunk, uuid.uuid4().hex[:12]) for chunk in chunks(needs, self.profile)]
        prepares: dict[Path, str] = {}  # run -> the job that prepares its dataset
        jobs: dict[str, dict[str, str]] = {nonce: {} for _, nonce in parts}  # nonce -> stage -> array
        refused = None
        try:
            for chunk, nonce in parts:
                self._lay_out(chunk, nonce)
                indices = [index for index, need in chunk.needs.items() if "prepare" in need.stages]
                if indices:
                    array = jobs[nonce]["prepare"] = self._sbatch(chunk, ("prepare",), nonce, indices, None)
                    prepares |= {chunk.needs[index].run: f"{array}_{index}" for index in indices}
            for chunk, nonce in parts:
                after, prepared = self._first_dependency(chunk, prepares)
                for stages in chunk.jobs:
                    indices = list(chunk.needs)
                    array = self._sbatch(chunk, stages, nonce, indices, after, prepared=prepared)
                    jobs[nonce] |= dict.fromkeys(stages, array)
                    after, prepared = f"aftercorr:{array}", False
                self.middle = [f"{array}_{index}" for index in indices[len(indices) // 2 :][:3]]
        except FtError as error:
            refused = error
        nonces = {need.run: nonce for chunk, nonce in parts for need in chunk.needs.values() if need.run in prepares}
        for chunk, nonce in parts:
            self._write_down(chunk, nonce, jobs[nonce], prepares, nonces)
        if refused and self.profile.scheduler and self.profile.scheduler.max_jobs and "limit" in str(refused).lower():
            # Other jobs came in between.
            self.fed.waiting += sum(
                len(chunk.needs) for chunk, nonce in parts
                if not all(stage in jobs[nonce] for stages in chunk.jobs for stage in stages)
            )  # fmt: skip
            return None
        return refused

    def _lay_out(self, chunk: Chunk, nonce: str) -> None:
        """A link per task, by its index, and the folders of its logs, which Slurm does not make."""
        folder = self.sweep.arrays / nonce
        folder.mkdir(parents=True)
        profile = chunk.profile
        requested = {stages: chunk.asked(stages) for stages in chunk.all_jobs}

        def lay_out(index: int) -> None:
            need = chunk.needs[index]
            os.symlink(f"../../../../{need.run.name}", f"{folder}/{index}")
            for stages, request in requested.items():
                if stages[0] in need.stages:
                    requests.write(need.run, profile, need.plan, stages, request)

        threaded(lay_out, chunk.needs)
        events.append(self.sweep.events, events.submit_writer(), Intended(stage=ARRAYS, nonce=nonce))

    def _first_dependency(self, chunk: Chunk, prepares: dict[Path, str]) -> tuple[str | None, bool]:
        """sbatch's --dependency of a chunk's first array; whether its tasks must look if their dataset is there."""
        needs, words, prepared = chunk.needs, [], False
        waits = {index: need.prepare or prepares.get(need.prepared_by or Path(), "") for index, need in needs.items()}
        jobs = sorted({job for job in waits.values() if job})
        arrays = sorted({job.partition("_")[0] for job in jobs})
        follows = next(iter(needs.values())).before
        if follows:
            words = [f"aftercorr:{follows.partition('_')[0]}" if "_" in follows else f"afterok:{follows}"]
        elif len(jobs) == 1 and all(waits.values()):
            words = [f"afterok:{jobs[0]}"]
        elif len(arrays) == 1 and all(job == f"{arrays[0]}_{index}" for index, job in waits.items()):
            words = [f"aftercorr:{arrays[0]}"]
        elif jobs:
            words, prepared = [f"afterany:{':'.join(arrays)}"], True
        if self.at_once and (others := self.active.get(chunk.jobs[0][0])):
            words.append(f"afterany:{':'.join(sorted(others))}")  # arrays of one stage never run at the same time
        return ",".join(words) or None, prepared

    def _sbatch(
        self, chunk: Chunk, stages: Sequence[str], nonce: str, indices: list[int], after: str | None, *,
        prepared: bool = False,
    ) -> str:  # fmt: skip
        name = AND.join(stages)
        array = self.executor(chunk, stages, nonce, indices, after, prepared=prepared).queue(
            f"{name} of {len(indices)} points", patience_s=self.patience_s
        )
        self.fed.queued[name] += len(indices)
        self.fed.arrays[name] += 1
        for stage in stages:
            self.active.setdefault(stage, set()).add(array)
        return array

    def executor(
        self, chunk: Chunk, stages: Sequence[str], nonce: str, indices: list[int], after: str | None, *,
        prepared: bool,
    ) -> ModuleExecutor:  # fmt: skip
        """submitit's executor of one array, whose tasks run `stages` one after the other."""
        needs, folder = [chunk.needs[index] for index in indices], self.sweep.arrays / nonce
        profile, plan = chunk.profile, needs[0].plan
        name, first, asked = AND.join(stages), stages[0], chunk.asked(stages)
        variables = batch.environment(profile, plan, first, run=None, cache=self.cache)
        words = batch.parameters(
            profile, asked, name=f"{self.sweep.name}.{name}", shared=len(stages) > 1,
            setup=batch.array_setup(
                profile, variables, self.sweep.runs, folder, stages, asked.time_min, prepared=prepared
            ),
            comment=comments.write(self.sweep.name, stages, nonce),
            dependency=",".join(filter(None, [after, f"afterok:{self.image}" if self.image else None])) or None,
        )  # fmt: skip
        runs = [RunDir(need.run) for need in (needs if profile.container else needs[:1])]
        known = [run.provenance() for run in runs if run.provenance_file.exists()]  # in a dry run none is there
        known = known or [{"checkout": str(self.sweep.runs.parent)}]
        made = ModuleExecutor(
            folder, python=container.worker(profile, plan, first, *known), module=STAGE_MODULE,
            srun_options=batch.output(stages),
        )  # fmt: skip
        made.update_parameters(**batch.array(words, folder, first, indices, self.at_once))
        return made

    def _write_down(
        self, chunk: Chunk, nonce: str, arrays: dict[str, str], prepares: dict[Path, str], nonces: dict[Path, str]
    ) -> None:
        memory = {
            stage: requests.memory(chunk.profile, chunk.asked(stages)) for stages in chunk.all_jobs for stage in stages
        }

        def note(index: int) -> None:
            need = chunk.needs[index]
            by = need.prepared_by
            jobs = {stage: f"{array}_{index}" for stage, array in arrays.items() if stage != "prepare"}
            of = dict.fromkeys(jobs, nonce)
            if by and (job := need.prepare or prepares.get(by)):
                jobs["prepare"] = job
                of["prepare"] = nonces.get(by) or RunDir(by).ledger().submissions["prepare"].nonce
            if jobs:
                if self.image:
                    jobs[IMAGE], of[IMAGE] = self.image, ""
                shared = by.name if by else None
                record(RunDir(need.run), jobs, of, automatic=need.automatic, prepared_by=shared, memory=memory)

        threaded(note, chunk.needs)
        events.append(self.sweep.events, events.submit_writer(), Submitted(stage=ARRAYS, job_id="", nonce=nonce))


def preview(
    sweep: SweepDir, profile: ClusterProfile, needs: list[Need], at_once: int | None, cache: Path
) -> Iterator[tuple[str, str]]:
    """(what, script) of the arrays that `needs` would be queued in, to the letter but for ids that are not known."""
    feeding = Arrays(sweep, profile, Fed(), at_once, cache)
    for number, chunk in enumerate(chunks(needs, profile), 1):
        before = ""
        for stages in (("prepare",), *chunk.jobs):
            name = AND.join(stages)
            indices = [index for index, need in chunk.needs.items() if stages[0] in need.stages]
            after = f"after{'ok' if before == 'prepare' else 'corr'}:<job id of {before}>" if before else None
            if indices:
                made = feeding.executor(chunk, stages, f"<nonce {number}>", indices, after, prepared=False)
                yield f"{name}.sbatch, {len(indices)} point{'s' * (len(indices) > 1)}", made.script()
            before = name
