"""Every submission is planned anew: from what the run was submitted with, what its owner changed and what was learned.

No plan of an earlier submission is read; what decides the bits stays as it was begun.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ftlib import rundir
from ftlib.errors import InputError
from ftlib.plan import numerics
from ftlib.profile import ClusterProfile
from ftlib.rundir import RunDir
from ftlib.runs.events import CheckpointSaved, Override
from ftlib.slurm import evidence, requests
from jobs import chain, changes, placement, runs
from jobs import wish as wishes
from tests.wishes import CHECKOUT

# Run folders of the first release: specs, plans and provenance.
RELEASE_1 = Path(__file__).parent / "release_1"
HIPERGATOR = "cluster.account=lab"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "ada's place"


def make(place: Path, *, model: str = "llama2-7b", cluster: str = "hipergator", settings: str = HIPERGATOR) -> RunDir:
    """A run folder as submitting leaves it, without a snapshot of its own."""
    wanted = wishes.make(model=model, data=None, cluster=cluster, settings=settings)
    (place / "code").mkdir(parents=True)
    return rundir.create(place / "runs", wanted.name, wishes.files_of(wanted, wanted.name), place / "code")


def script(run: RunDir, stage: str = "train") -> str:
    """The batch script of a stage, as it would be submitted now."""
    where = placement.of(run)
    stages = next(stages for stages in where.plan.jobs if stage in stages)
    made = chain.executor(
        where.profile, where.plan, stages, run.provenance(), run=run.path, comment="a comment", after=None
    )  # fmt: skip
    return made.script()


def options(text: str) -> dict[str, str]:
    """sbatch's options in a script."""
    found = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE)
    return {name: "".join(shlex.split(value)) for name, value in found}


def override(run: RunDir, field: str, value: Any, **more: Any) -> None:
    run.record(Override(field=field, value=value, who="a test", why="because", **more))


def resumed(run: RunDir, monkeypatch: pytest.MonkeyPatch, settings: str = "", nodes: str = "") -> ClusterProfile:
    """`make resume SET=… NODES=…`, up to where jobs would be queued; the profile that they would be queued under."""
    under: list[ClusterProfile] = []
    monkeypatch.setattr(runs, "RUNS", run.path.parent)
    monkeypatch.setattr(runs, "_active", lambda _: {})
    monkeypatch.setattr(runs, "go_on", lambda _, profile, *, asked: under.append(profile) or 0)
    runs.resume(argparse.Namespace(run=run.name, set=settings, nodes=nodes))
    return under[0]


def changed(run: RunDir) -> list[tuple[str, Any]]:
    return [(event.field, event.value) for event in run.ledger().of(Override)]


# -- one profile for all that is requested ---------------------------------------------------------------------------


def test_a_new_partition_brings_its_qos_gres_and_account(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of the first submission had the old partition and QOS, the new profile its GRES and account."""
    run = make(place)
    before = options(script(run))
    assert (before["partition"], before["qos"], before["gres"]) == ("hpg-b200", "lab", "gpu:b200:1")
    resumed(run, monkeypatch, 'cluster.gpu_partition=hpg-rtx6000 cluster.account=other "cluster.qos={account}-b"')
    after = options(script(run))
    found = {name: after[name] for name in ("partition", "qos", "gres", "account")}
    assert found == {"partition": "hpg-rtx6000", "qos": "other-b", "gres": "gpu:rtx_pro_6000:1", "account": "other"}
    prepare = options(script(run, "prepare"))
    assert (prepare["partition"], prepare["qos"], prepare["account"]) == ("hpg-default", "other-b", "other")
    assert run.provenance()["profile"]["account"] == "lab"  # what it was submitted under stays on record
    assert run.plan()["stages"]["train"]["partition"] == "hpg-b200"  # what was shown, too
    event = run.ledger().of(Override)[0]
    assert (event.field, event.why) == ("cluster.gpu_partition", "make resume") and event.who


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("cluster.gpu_partition=hpg-b20", "gpu_partition.*Did you mean hpg-b200"),
        ("cluster.acount=lab", "acount is no known field.*Did you mean account"),
        ("'cluster.qos=x{acount}'", "qos: placeholder.*account"),
        ("cluster.scheduler.max_jobs=1", "scheduler.max_jobs"),
        ("cluster.name=a100", "a run stays on the cluster"),
        ("train.steps=3", "a run's recipe is fixed"),
    ],
)
def test_a_typo_is_refused_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, settings: str, told: str
) -> None:
    run = make(place)
    before = run.provenance_file.read_text()
    with pytest.raises(InputError, match=told):
        resumed(run, monkeypatch, settings)
    assert changed(run) == [] and run.provenance_file.read_text() == before
    assert options(script(run))["partition"] == "hpg-b200"


def test_the_plan_that_was_shown_is_never_read_for_a_submission(place: Path) -> None:
    run = make(place)
    before = script(run)
    run.plan_file.write_text(json.dumps({"stages": "another version's"}))
    assert script(run) == before


def test_submitting_again_is_under_the_profile_that_holds_now(place: Path) -> None:
    run = make(place)
    now = wishes.load_profile("hipergator", {"account": "lab", "qos": "lab-b", "mail_user": "ada@example.org"})
    wanted = changes.of_second_submit(run, now, [], {})
    assert {change.field: change.value for change in wanted} == {
        "cluster.qos": "lab-b", "cluster.mail_user": "ada@example.org"
    }  # fmt: skip
    changes.record(run, wanted)
    assert options(script(run))["qos"] == "lab-b"
    # What the owner changed meanwhile stays where neither the site's files nor this submit say otherwise.
    override(run, "cluster.account", "other")
    assert changes.of_second_submit(run, now, [], {}) == []
    (named,) = changes.of_second_submit(run, now, ["account"], {})
    assert (named.field, named.value, named.why) == ("cluster.account", "lab", "make submit")


# -- memory, nodes to avoid, warning ---------------------------------------------------------------------------------


def test_memory_that_ran_out_stays_larger_in_every_later_submission(place: Path) -> None:
    """It was lost where requeueing is forbidden: by the recovery job, and by make resume."""
    run = make(place)
    first = placement.of(run)
    requested = requests.memory(first.profile, first.plan.stages["train"])
    assert options(script(run))["mem"] == f"{first.plan.stages['train'].mem_gib}G"
    override(run, "memory_mib.train", int(1.5 * (requested.requested_mib or 0)))
    assert options(script(run))["mem"] == f"{-(-3 * first.plan.stages['train'].mem_gib // 2)}G"
    assert script(run, "prepare") == script(run, "prepare") and "--mem=4G" in script(run, "prepare")
    # Never more than a node has, on whatever partition.
    override(run, "memory_mib.train", 10**9)
    assert options(script(run))["mem"] == "2000G" and requested.node_mib == 2000 * 1024


def test_every_bad_node_and_the_owner_s_own_are_avoided_together(place: Path) -> None:
    """The second bad node replaced the first one, and the owner's list."""
    run = make(place, settings=f"{HIPERGATOR} 'cluster.exclude=c[01-03,7],d1'")
    for node in ("b5", "b2"):
        override(run, f"exclude.{node}", True, until=time.time() + 3600)
    override(run, "exclude.b9", True, until=time.time() - 1)
    for stage in ("prepare", "train", "evaluate"):
        assert options(script(run, stage))["exclude"] == "c[01-03,7],d1,b5,b2"
    override(run, "cluster.exclude", "e[1-2]")
    assert options(script(run))["exclude"] == "e[1-2],b5,b2"
    override(run, "cluster.exclude", None)
    assert options(script(run))["exclude"] == "b5,b2"


def test_the_warning_leaves_room_for_the_longest_save_so_far(place: Path) -> None:
    run = make(place)
    run.record(CheckpointSaved(stage="train", attempt=1, step=1, seconds=200.0), writer="train-1")
    assert (options(script(run))["signal"], options(script(run, "prepare"))["signal"]) == ("USR2@360", "USR2@120")


# -- what decides the bits -------------------------------------------------------------------------------------------


def test_another_gpu_leaves_the_numerics_and_a_smaller_one_halves_the_micro_batch(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(place, settings=f"{HIPERGATOR} train.global_batch=64 train.micro_batch=32")
    begun = run.numerics()
    resumed(run, monkeypatch, "cluster.gpu_partition=hpg-rtx6000")
    assert run.numerics() == begun and [field for field, _ in changed(run)] == ["cluster.gpu_partition"]
    resumed(run, monkeypatch, "cluster.gpu_partition=hpg-turin")
    now = run.numerics()
    assert now.micro_batch < begun.micro_batch and now.rows_per_step == begun.rows_per_step
    assert (now.threads, now.compute_dtype, now.stages) == (begun.threads, begun.compute_dtype, begun.stages)
    assert placement.of(run).plan.micro_batch == now.micro_batch


def test_a_run_never_moves_between_cpu_and_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(place)
    with pytest.raises(InputError, match="begun on a GPU, and partition 'hpg-default' would compute it on another"):
        resumed(run, monkeypatch, "cluster.gpu_partition=hpg-default")
    assert changed(run) == []


def test_other_threads_or_locks_change_nothing_by_themselves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(place, model="tiny", cluster="local-slurm", settings="")
    numerics.write(run.path, run.numerics().model_copy(update={"threads": 2}))
    assert "export OMP_NUM_THREADS=2" in script(run) and options(script(run))["cpus-per-task"] == "2"
    others = {**wishes.locks(), "train.lock": "0123"}
    monkeypatch.setattr(wishes, "locks", lambda: others)
    resumed(run, monkeypatch)
    assert changed(run) == [("versions.train.lock", "0123")] and run.numerics().versions["train.lock"] == "0123"


def test_the_numerics_are_stored_before_the_first_attempt(place: Path) -> None:
    run = make(place, model="llama2-70b-zero3")
    stored = json.loads((run.path / "numerics.json").read_text())
    assert set(stored) == set(numerics.Numerics.model_fields)
    assert all(field.description for field in numerics.Numerics.model_fields.values())
    assert stored["zero"] == run.plan()["zero"] and stored["versions"] == run.provenance()["locks"]
    assert stored["stages"]["export"] == {"device": "cpu", "deterministic": True}
    assert stored["stages"]["evaluate"] == {"device": "cuda", "deterministic": False}


# -- runs of the first release, and other code -----------------------------------------------------------------------


def of_the_first_release(run: RunDir) -> None:
    """Leave in a run's folder what commit e3be524 wrote: one device for all stages, no numerics."""
    plan = run.plan()
    (run.path / numerics.FILE).unlink()
    on_gpu = any(stage["device"] == "cuda" for stage in plan["stages"].values())
    for stage in plan["stages"].values():
        del stage["device"]
    for name in ("compute_dtype", "row_tokens"):
        del plan[name]
    run.plan_file.write_text(json.dumps({**plan, "device": "cuda" if on_gpu else "cpu", "gone": 1}))
    provenance = run.provenance()
    del provenance["planned_from"]
    provenance["profile"]["gone"] = 1
    run.provenance_file.write_text(json.dumps(provenance))


def test_a_run_of_the_first_release_is_placed_and_resumed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(place, model="tiny", cluster="local-slurm", settings="")
    before, begun = script(run), run.numerics()
    of_the_first_release(run)
    found = run.numerics().model_dump()
    assert found == {**begun.model_dump(), "stages": found["stages"]} and script(run) == before
    resumed(run, monkeypatch, "cluster.qos=group-b", nodes="2")
    # Its own code reads the plan and the profile.
    plan, profile = run.plan(), run.provenance()["profile"]
    assert (plan["world_size"], plan["stages"]["train"]["nodes"], profile["qos"]) == (2, 2, "group-b")
    assert plan["device"] == "cpu" and plan["micro_batch"] * plan["accumulation"] * 2 == begun.rows_per_step
    assert (run.numerics().world_size, options(script(run))["nodes"]) == (2, "2")


@pytest.mark.parametrize("name", sorted(path.name for path in RELEASE_1.iterdir()))
def test_runs_that_commit_e3be524_has_made_are_placed(place: Path, name: str) -> None:
    """Its files, to the letter but for paths."""
    (place / "code").mkdir(parents=True)
    shutil.copytree(RELEASE_1 / name, place / name)
    run = RunDir(place / name)
    text = run.provenance_file.read_text().replace('"CHECKOUT', f'"{CHECKOUT}').replace('"CACHE', f'"{place}')
    run.provenance_file.write_text(text)
    begun, where = run.numerics(), placement.of(run)
    assert begun.world_size == run.plan()["world_size"] == where.plan.world_size
    assert begun.zero == run.plan()["zero"] and begun.stages["train"].device == run.plan()["device"]
    assert where.plan.stages["train"].partition == run.plan()["stages"]["train"]["partition"]
    assert not changes.of_resume(run, {}, "", busy=[], locks={})


@pytest.mark.parametrize("spoil", ["{", "{}", '{"stages": {}}', '{"stages": {"train": {}}}', "[]"])
def test_a_plan_that_cannot_be_understood_is_named(place: Path, spoil: str) -> None:
    run = make(place, model="tiny", cluster="local-slurm", settings="")
    of_the_first_release(run)
    run.plan_file.write_text(spoil)
    with pytest.raises(InputError, match=r"there is no numerics\.json, and its plan\.json does not hold"):
        placement.of(run)


def test_spoilt_numerics_are_named(place: Path) -> None:
    run = make(place, model="tiny", cluster="local-slurm", settings="")
    (run.path / numerics.FILE).write_text('{"format": 2}')
    with pytest.raises(InputError, match=r"numerics\.json: cannot be read \(format"):
        placement.of(run)


def test_the_run_s_own_code_plans_it(place: Path) -> None:
    """A checkout that has moved on asks the snapshot."""
    run = make(place, model="tiny", cluster="local-slurm", settings="")
    code = place / "other code"
    for name in ("ftlib", "jobs"):
        shutil.copytree(CHECKOUT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = code / "ftlib" / "plan" / "plan.py"
    file.write_text(file.read_text().replace("LEAST_WARNING_S = 120", "LEAST_WARNING_S = 345"))
    run.code.unlink()
    run.code.symlink_to(code)
    assert {stage.warning_s for stage in placement.of(run).plan.stages.values()} == {345}
    wanted = Override(field="cluster.exclude", value="n[1-2]", who="a test", why="because")
    override(run, "exclude.n3", True)
    found = placement.of(run, [wanted])
    assert (found.profile.exclude, found.owner_exclude, found.excluded) == ("n[1-2],n3", "n[1-2]", ("n3",))
    with pytest.raises(InputError, match=r"exclude: .*\(found 5\)"):
        placement.of(run, [Override(field="cluster.exclude", value=5, who="a test", why="because")])
    (code / "ftlib" / "plan" / "plan.py").write_text("raise SystemExit('broken')")
    with pytest.raises(InputError, match="the run's own code could not plan its jobs: broken"):
        placement.of(run)


# -- what a job was submitted with -----------------------------------------------------------------------------------


def test_what_a_job_was_submitted_with_is_recorded_for_the_job_and_its_owner(place: Path) -> None:
    run = make(place)
    assert run.stage_plan("train")["partition"] == "hpg-b200"
    override(run, "cluster.gpu_partition", "hpg-rtx6000")
    where = placement.of(run)
    for job, stages in (("7", ("train",)), ("8", ("export", "evaluate"))):
        requests.write(run.path, where.profile, where.plan, stages)
        requests.keep(run.path, stages, job)
    assert run.stage_plan("train")["partition"] == run.stage_plan("evaluate")["partition"] == "hpg-rtx6000"
    # So does who finds out why the job ended: when its limit was, how many ranks it had.
    assert evidence.gather(run.path, run.ledger(), "train", 1, slurm=False, job_id="7").warning_s == 120
    (run.slurm / "train" / "7_request.json").write_text('{"stage": {"warning_s": 345, "time_min": 600}}')
    assert evidence.gather(run.path, run.ledger(), "train", 1, slurm=False, job_id="7").warning_s == 345
    kept = json.loads((run.slurm / "export" / "8_request.json").read_text())
    assert kept["stages_of_job"] == ["export", "evaluate"] and kept["account"] == "lab"
    assert kept["job"]["time_min"] == sum(where.plan.stages[stage].time_min for stage in ("export", "evaluate"))
