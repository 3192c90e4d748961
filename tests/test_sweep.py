"""Sweeps: how the points are queued within a site's limits, and what is queued again."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.rundir import STAGES
from ftlib.runs import outcome
from ftlib.runs.events import Decided, Override, Settled
from ftlib.slurm import batch
from tests.array_shims import Login, quick_python
from tests.sweeps import JOBS, TASKS, complete, fail, feeder, fresh, place, queued, seeds, strangers, swept


def test_indices_as_slurm_says_them() -> None:
    assert batch.ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert batch.ranges([5]) == "5"


@pytest.mark.slow
def test_five_thousand_points_are_a_few_arrays_and_one_prepare_job(login: Login, file: Callable[..., str]) -> None:
    name = file(
        "grid:\n  optim.lr: ["
        + ", ".join(f"{1 + i / 1000}e-4" for i in range(1250))
        + "]\n  method.rank: [8, 12, 16, 24]\n"
    )
    swept(login, name)
    queue = login.queue
    assert queued(login) == {"prepare": 1, "train": 5000, "export+evaluate": 5000, "feeder": 1}
    assert [len(queue.of(stage)) for stage in JOBS] == [1, 5, 5]  # ⌈5000 / 1001⌉
    members = place(login).members()
    assert len(members) == 5000
    jobs_of = [run.ledger().jobs for run in members]
    for stage in TASKS:
        assert len({found[stage] for found in jobs_of}) == 5000
    assert len({found["prepare"] for found in jobs_of}) == 1
    # Each run has its own index in the arrays that wait for each other task by task; two stages share a task.
    assert all(found["export"] == found["evaluate"] != found["train"] for found in jobs_of)
    assert all(len({found[stage].partition("_")[2] for stage in TASKS}) == 1 for found in jobs_of)
    first = {name: queue.arrays[queue.of(name)[0]]["dependency"] for name in JOBS}
    assert first == {
        "prepare": "",
        "train": f"afterok:{queue.of('prepare')[0]}_0",
        "export+evaluate": f"aftercorr:{queue.of('train')[0]}",
    }
    # The same code for all, once.
    assert len({run.code.resolve() for run in members}) == 1
    again = swept(login, name)
    assert "Nothing was queued" in again and "5000 on its way" in again
    assert queued(login)["train"] == 5000


@pytest.mark.parametrize(("most", "points"), [(210, 150), (3000, 1505), (1001, 510)])
def test_a_site_s_limit_is_never_exceeded_and_the_feeder_queues_the_rest(
    checkout: Path, tmp_path: Path, file: Callable[..., str], most: int, points: int
) -> None:
    login = fresh(checkout, tmp_path, MAX_SUBMIT=str(most))
    out = swept(login, file(seeds(points)), settings=f"cluster.scheduler.max_jobs={most}")
    fits = (most - 2) // 2  # two jobs a point; one prepare job, one feeder
    assert f"{points - fits} wait for room" in out
    for _ in range(math.ceil(points / fits) + 1):
        assert sum(queued(login).values()) <= most
        queue = login.queue
        last = queue.arrays[queue.of("feeder")[-1]]["dependency"] if queued(login)["feeder"] else ""
        if not queued(login)["train"]:
            break
        waits = points - len(place(login).members()) or "wait for room" in out
        if waits and last:
            # It wakes when half of the newest points are through, not at the last one's end.
            newest = queue.of("evaluate")[-1]
            half = len(queue.arrays[newest]["tasks"]) // 2
            assert f"afterany:{newest}_{half}" in last
        complete(login, *(array for name in JOBS for array in queue.of(name)))
        out = feeder(login) if last else ""
    assert sum(queued(login, "COMPLETED")[name] for name in JOBS[1:]) == 2 * points
    assert all(run.stage_done("evaluate") for run in place(login).members())
    assert queued(login, "COMPLETED")["prepare"] == 1
    largest_array = 1001  # the profile's max_array_size
    fed = (min(fits, points - start) for start in range(0, points, fits))
    assert len(login.queue.of("train")) == sum(math.ceil(count / largest_array) for count in fed)


def test_what_other_jobs_have_taken_is_left_to_them(login: Login, file: Callable[..., str]) -> None:
    queue = login.queue
    strangers(queue, 98)
    name = file(seeds(3))
    out = swept(login, name, settings="cluster.scheduler.max_jobs=100")
    assert "Nothing was queued" in out and "3 wait for room" in out
    queue = login.queue
    assert "begin=now+10minutes" in queue.arrays[queue.of("feeder")[-1]]["script"]
    queue.arrays["900"]["tasks"] = {}
    queue.save()
    assert "train 3" in feeder(login)


def test_later_points_join_the_prepare_job_that_is_queued(login: Login, file: Callable[..., str]) -> None:
    queue = login.queue
    strangers(queue, 92)
    name = file(seeds(7))
    assert "4 wait for room" in swept(login, name, settings="cluster.scheduler.max_jobs=100")
    queue = login.queue
    queue.arrays["900"]["tasks"] = {}
    queue.save()
    assert "Queued: train 4 in 1 array" in swept(login, name, settings="cluster.scheduler.max_jobs=100")
    queue = login.queue
    (job,) = {run.ledger().jobs["prepare"] for run in place(login).members()}
    assert [queue.arrays[array]["dependency"] for array in queue.of("train")] == [f"afterok:{job}"] * 2
    complete(login, *queue.of("prepare"))
    assert all(run.stage_done("prepare") for run in place(login).members())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_submit_leaves_no_orphan_and_no_double(login: Login, file: Callable[..., str], at: int) -> None:
    name = file(seeds(6))
    wish = ("sweep", "--sweep", name, "--cluster", "local-slurm", "--set", "tracking.mode=disabled")
    assert login.jobs(*wish, KILL_AT=str(at)).returncode == -9
    assert len(login.queue.arrays) == at
    swept(login, name)
    assert queued(login) == {"prepare": 1, "train": 6, "export+evaluate": 6, "feeder": 1}
    for run in place(login).members():
        found = run.ledger().jobs
        assert set(found) == {*STAGES}
        indices = {stage: found[stage].partition("_")[2] for stage in TASKS}
        assert len(set(indices.values())) == 1


def test_only_missing_and_failed_points_are_queued_again(login: Login, file: Callable[..., str]) -> None:
    name = file(seeds(8))
    # A point run by hand counts.
    alone = login.jobs("submit", "--cluster", "local-slurm", "--set", "tracking.mode=disabled train.seed=2")
    assert alone.returncode == 0, alone.stderr
    out = swept(login, name)
    assert "1 have a run already" in out and "1 on its way" in out
    assert queued(login)["train"] == 8 and len(login.queue.of("train")) == 2
    array = login.queue.of("train")[-1]
    complete(login, login.queue.of("prepare")[-1])
    run = fail(login, array, "3")
    settled = Settled(stage="train", attempt=1, job_id=f"{array}_3", cause="code", by="epilogue")
    decided = Decided(stage="train", attempt=1, choice="stop", cause="code", message="a bug")
    run.record(settled, decided, writer="train-1-epilogue")
    (run.lives / "train-1").write_text(f"{array}_3 n1 1 \n")
    outcome.write(run.outcomes, outcome.Outcome("train", 1, 1, "a bug"))
    # The feeder leaves alone what the guard's rules have stopped, and the rest on its way.
    assert "a bug" in feeder(login) and queued(login)["train"] == 7
    # A person's word counts more.
    again = swept(login, name)
    assert "Queued: train 1 in 1 array, export+evaluate 1 in 1 array" in again
    assert queued(login)["train"] == 8 and run.ledger().jobs["train"] == f"{login.queue.of('train')[-1]}_0"


def test_a_lost_task_is_queued_again_by_the_feeder_within_its_budget(login: Login, file: Callable[..., str]) -> None:
    swept(login, file(seeds(4)))
    complete(login, *login.queue.of("prepare"))
    for _ in range(2):
        fail(login, login.queue.of("train")[-1], "0" if len(login.queue.of("train")) > 1 else "2")
        assert "train 1 in 1 array" in feeder(login)
    fail(login, login.queue.of("train")[-1], "0")
    assert "3 jobs in a row ended before they began" in feeder(login)


def test_a_failed_prepare_job_is_queued_again_for_all_its_points(login: Login, file: Callable[..., str]) -> None:
    swept(login, file(seeds(5)))
    queue = login.queue
    queue.arrays[queue.of("prepare")[0]]["tasks"]["0"] = "FAILED"
    for name in JOBS[1:]:
        queue.arrays[queue.of(name)[0]]["tasks"] = dict.fromkeys(map(str, range(5)), "CANCELLED")
    queue.save()
    assert "prepare 1 in 1 array, train 5 in 1 array" in feeder(login)
    assert len({run.ledger().jobs["prepare"] for run in place(login).members()}) == 1


def test_a_cancelled_sweep_stays_so_until_it_is_resumed(login: Login, file: Callable[..., str]) -> None:
    name = file(seeds(5))
    swept(login, name)
    done = login.jobs("cancel", "--sweep", name)
    assert done.returncode == 0 and "cancelled 5 points" in done.stdout, done.stderr
    assert not queued(login)
    assert "5 cancelled" in swept(login, name) and not queued(login)
    # One of them is saving still: what would be queued behind it would be cancelled with its end.
    queue = login.queue
    queue.arrays[queue.of("train")[0]]["tasks"]["2"] = "RUNNING"
    queue.arrays[queue.of("prepare")[0]]["tasks"]["0"] = "COMPLETED"
    queue.save()
    assert "1 was cancelled and is still saving" in login.jobs("resume", "--sweep", name).stdout
    queue = login.queue
    queue.arrays[queue.of("train")[0]]["tasks"]["2"] = "CANCELLED"
    queue.save()
    resumed = login.jobs("resume", "--sweep", name)
    assert resumed.returncode == 0, resumed.stderr
    assert queued(login)["train"] == 5


def test_what_points_have_learned_and_their_owner_has_changed_reaches_their_arrays(
    login: Login, file: Callable[..., str]
) -> None:
    name = file(seeds(4))
    swept(login, name)
    assert login.jobs("cancel", "--sweep", name).returncode == 0
    larger, avoids, elsewhere, _ = place(login).members()
    for run, field, value in (
        (larger, "memory_mib.train", 7 * 1024), (avoids, "exclude.n3", True), (elsewhere, "cluster.qos", "group-b"),
    ):  # fmt: skip
        run.record(Override(field=field, value=value, who="a test", why="because"))
    resumed = login.jobs("resume", "--sweep", name)
    assert resumed.returncode == 0, resumed.stderr
    queue = login.queue
    scripts = {queue.arrays[array]["script"] for array in queue.of("train")[1:]}
    asked = {tuple(sorted(re.findall(r"^#SBATCH --(?:qos|mem|exclude)=\S+$", text, re.MULTILINE))) for text in scripts}
    assert asked == {
        ("#SBATCH --exclude=n3", "#SBATCH --mem=7G", "#SBATCH --qos=group"),
        ("#SBATCH --mem=6G", "#SBATCH --qos=group-b"),
    }
    recorded = larger.ledger().submissions["train"]
    assert (recorded.mem_mib, recorded.node_mem_mib) == (7 * 1024, 60 * 1024)
    assert json.loads((larger.slurm / "train" / "request.json").read_text())["job"]["mem_gib"] == 7


def test_two_datasets_are_two_prepare_jobs_and_no_point_waits_for_a_failed_one_of_another(
    login: Login, file: Callable[..., str]
) -> None:
    swept(login, file("grid: {data.limit: [100, 200], train.seed: [1, 2, 3]}"))
    queue = login.queue
    assert queued(login)["prepare"] == 2 and len(queue.of("prepare")) == len(queue.of("train")) == 1
    train = queue.arrays[queue.of("train")[0]]
    assert train["dependency"] == f"afterany:{queue.of('prepare')[0]}" and "prepared.json" in train["script"]
    assert queue.arrays[queue.of("prepare")[0]]["array"] == "0,3"
    shutil.rmtree(login.checkout / "runs")
    login.file.unlink()
    swept(login, file("grid: {data.limit: [100, 200, 300]}"))
    queue = login.queue
    assert queue.arrays[queue.of("train")[0]]["dependency"] == f"aftercorr:{queue.of('prepare')[0]}"


def test_at_most_so_many_at_once(login: Login, file: Callable[..., str]) -> None:
    name = file("grid: {resources.gpus_per_node: [1, 2], train.seed: [1, 2, 3, 4, 5, 6]}\nat_once: 4\n")
    swept(login, name)
    queue = login.queue
    first, second = queue.of("train")  # another shape is another array
    assert {queue.arrays[array]["array"] for array in (first, second)} == {"0-5%4"}
    assert queue.arrays[second]["dependency"].endswith(f"afterany:{first}")


def test_a_changed_file_says_what_differs(login: Login, file: Callable[..., str]) -> None:
    name = file(seeds(4))
    swept(login, name)
    (login.checkout / "jobs" / "sweeps" / f"{name}.yaml").write_text("grid: {train.seed: [2, 3, 4]}\nmetric: exact\n")
    out = swept(login, name)
    assert "1 points are new, 2 are no longer in it, 2 stay" in out
    assert "gone: train.seed=" in out and "metric: perplexity -> exact" in out
    assert queued(login)["train"] == 5


def test_a_folder_that_is_another_run_s_is_not_taken_for_the_point(login: Login, file: Callable[..., str]) -> None:
    name = file(seeds(3))
    swept(login, name)
    first, second, _ = place(login).members()
    wanted = second.requested()
    shutil.rmtree(second.path)
    shutil.copytree(first.path, second.path, symlinks=True)
    out = swept(login, name)
    assert f"{second.name} holds another run's settings, so this run is {second.name}-2." in out
    assert queued(login)["train"] == 4
    (moved,) = [run for run in place(login).members() if run.name == f"{second.name}-2"]
    assert moved.requested() == wanted
    assert "3 on its way" in swept(login, name) and queued(login)["train"] == 4


def test_a_dry_run_shows_the_scripts_and_leaves_nothing(login: Login, file: Callable[..., str]) -> None:
    out = swept(login, file(seeds(7)), "--dry-run")
    assert [line for line in out.splitlines() if line.startswith("=====")] == [
        "===== prepare.sbatch, 1 point =====", *(f"===== {name}.sbatch, 7 points =====" for name in JOBS[1:])
    ]  # fmt: skip
    assert "#SBATCH --array=0-6" in out and not (login.checkout / "runs").exists() and not login.file.exists()


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def exported(login: Login) -> list[bool]:
    """Whether each point exports merged weights, in the order of their names."""
    return [run.spec().export.merged for run in place(login).members()]


def test_points_export_adapters_alone_unless_they_have_none_or_are_told_otherwise(
    login: Login, checkout: Path, tmp_path: Path, file: Callable[..., str]
) -> None:
    out = swept(login, file(seeds(2)))
    assert exported(login) == [False, False]
    assert "adapters alone are exported" in out and "GiB on disk" in out
    login = fresh(checkout, empty(tmp_path / "1"))
    assert "adapters alone" not in swept(login, file(seeds(2)), settings="export.merged=true")
    assert exported(login) == [True, True]
    login = fresh(checkout, empty(tmp_path / "2"))
    swept(login, file("grid: {export.merged: [true, false]}"))
    assert sorted(exported(login)) == [False, True]
    login = fresh(checkout, empty(tmp_path / "3"))
    swept(login, file("list: [{method.kind: full}]"))  # the weights are the export
    assert exported(login) == [True]


def test_how_many_gpus_a_sweep_holds_at_once_is_said_before(login: Login, file: Callable[..., str]) -> None:
    out = swept(login, file(seeds(7)), "--dry-run")
    assert "holds up to 7 GPUs at once (at_once in the sweep's file bounds it)" in out
    # Two train, two are exported and judged.
    out = swept(login, file(seeds(7, "at_once: 2")), "--dry-run")
    assert "holds up to 4 GPUs at once (at_once: 2)" in out
    two = "resources.gpus_per_node=2 train.global_batch=4 cluster.scheduler.max_jobs=5"
    assert "holds up to 10 GPUs at once" in swept(login, file(seeds(7)), "--dry-run", settings=two)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "grid: {train.seed: [1, 2], optim.lr: [1.0e-3, 7], method.rank: [0]}",
            ["optim.lr", "(in 2 of 4 points, first train.seed=1 optim.lr=7 method.rank=0)", "method.rank"],
        ),
        (
            f"grid: {{train.seed: {list(range(200))}, method.rank: {list(range(1, 101))}}}",
            ["20,000 points (200 train.seed × 100 method.rank)", "days of work", "allows 10,000 (scheduler.max_p"],
        ),
    ],
)  # fmt: skip
def test_wrong_points_are_refused_before_anything_is_made(
    login: Login, file: Callable[..., str], text: str, words: list[str]
) -> None:
    done = login.jobs("sweep", "--sweep", file(text), "--cluster", "local-slurm")
    assert done.returncode == 64 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (login.checkout / "runs").exists() and not login.file.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sweep", "--sweep", "lr-rnk"), "Did you mean lr-rank?"),
        (("report", "--sweep", "lr-rank"), "There are no sweeps in"),
        (("cancel",), "RUN= or SWEEP= is missing"),
        (("sweep",), "--sweep"),
    ],
)
def test_wrong_words_exit_64(login: Login, words: tuple[str, ...], told: str) -> None:
    done = login.jobs(*words)
    assert done.returncode == 64 and told in done.stderr and "Traceback" not in done.stderr


def test_without_slurm_the_points_run_here_one_after_the_other(
    login: Login, file: Callable[..., str], tmp_path: Path
) -> None:
    name, quick = file(seeds(3)), quick_python(tmp_path, 0.1)
    wish = ("--sweep", name, "--cluster", "local", "--set", f"cluster.python={quick}")
    # The second point's folder is there beforehand, and its training fails.
    assert login.jobs("submit", "--cluster", "local", "--set", f"cluster.python={quick} train.seed=1").returncode == 0
    (failing,) = (login.checkout / "runs").glob("tiny-*")
    shutil.rmtree(failing / "outcomes")
    (failing / "outcomes").mkdir()
    (failing / "fails").touch()
    done = login.jobs("sweep", *wish)
    assert done.returncode == 1 and "2 of 3 points are completed" in done.stdout, done.stdout + done.stderr
    assert f"failed: make why RUN={failing.name}" in done.stdout
    (failing / "fails").unlink()
    again = login.jobs("sweep", *wish)
    assert again.returncode == 0 and again.stdout.count("completed before") == 2, again.stdout + again.stderr
    members = place(login).members()
    assert all(run.stage_done("evaluate") for run in members)
    # The two that the sweep made share what one of them prepared.
    assert sum((run.lives / "prepare-1").exists() for run in members) == 2


def test_a_cancelled_point_leaves_the_dataset_to_the_others(login: Login, file: Callable[..., str]) -> None:
    swept(login, file(seeds(3)))
    first, *_ = place(login).members()
    done = login.jobs("cancel", "--run", first.name)
    assert done.returncode == 0, done.stderr
    assert queued(login) == {"prepare": 1, "train": 2, "export+evaluate": 2, "feeder": 1}


def test_a_point_that_another_process_is_queueing_is_left_to_it(login: Login, file: Callable[..., str]) -> None:
    name = file(seeds(3))
    swept(login, name, "--dry-run")
    words = ("submit", "--cluster", "local-slurm", "--set", "tracking.mode=disabled train.seed=1")
    alone = login.jobs(*words, KILL_AT="1")
    assert alone.returncode == -9
    (run,) = (login.checkout / "runs").glob("tiny-*")
    (run / "writer").write_text("elsewhere 1")
    assert "1 another process is queueing it" in swept(login, name)
    assert queued(login)["train"] == 2
