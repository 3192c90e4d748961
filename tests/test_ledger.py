"""One run, no orphans, no double work: submits that are killed or meet, and the guard. Slurm is a few shims."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftlib.rundir import STAGES, RunDir
from ftlib.runs.events import Decided, Override
from ftlib.runs.ledger import RECOVERY
from tests.processes import started
from tests.wishes import CHECKOUT, run_names

# The queue is a folder: a file a job, "STATE comment". What each command says is what the real one says.
SBATCH = """script=$(for word; do :; done; echo "$word")
sleep "${SLOW:-0}"
number=$(($(cat "$QUEUE/../last" 2>/dev/null || echo 100) + 1)); echo $number >"$QUEUE/../last"
echo "PENDING $(sed -n "s/^#SBATCH --comment='*\\([^']*\\)'*$/\\1/p" "$script")" >"$QUEUE/$number"
[ "$KILL_PARENT" != 1 ] && [ "$KILL_PARENT" != "$number" ] || kill -9 $PPID
echo "Submitted batch job $number"
"""
SQUEUE = """for job in "$QUEUE"/*; do
    [ -e "$job" ] || continue
    read -r job_state comment <"$job"
    printf '%s\\037%s\\037None\\037%s\\037N/A\\n' "${job##*/}" "$job_state" "$comment"
done
"""
SCANCEL = """for number; do
    [ -e "$QUEUE/$number" ] || continue
    read -r _ comment <"$QUEUE/$number"; echo "CANCELLED $comment" >"$QUEUE/$number"
done
"""
SACCT = """case "$*" in *Start*) cat "$QUEUE/../lives" 2>/dev/null ;; esac
exit 0
"""
SCONTROL = """[ "$2" = config ] && echo "ClusterName = local-slurm"
[ "$2" = config ]
"""
SETTINGS = "data.pairs=600 tracking.mode=disabled"


class Login:
    """A copy of the checkout on a machine whose Slurm is shims."""

    def __init__(self, place: Path) -> None:
        self.checkout, self.queue = place / "checkout", place / "queue"
        self.queue.mkdir()
        self.checkout.mkdir()
        for name in ("ftlib", "jobs", "slurm_templates", "models", "env"):
            shutil.copytree(CHECKOUT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        tools = place / "bin"
        tools.mkdir()
        shims = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "sacct": SACCT, "scontrol": SCONTROL}
        for name, body in {**shims, "srun": "exit 0\n"}.items():
            (tools / name).write_text("#!/bin/bash\n" + body)
            (tools / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env = {**kept, "PATH": f"{tools}:{os.environ['PATH']}", "QUEUE": str(self.queue)}

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=self.checkout, env={**self.env, **environment}, text=True,
            capture_output=True, timeout=120,
        )  # fmt: skip

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        wish = ("--cluster", "local-slurm", "--set", SETTINGS)
        return self.python("-m", "jobs", "submit", *wish, *words, **environment)

    def run(self) -> RunDir:
        (name,) = run_names(self.checkout)
        return RunDir(self.checkout / "runs" / name)

    def jobs(self, *states: str) -> Counter[str]:
        """How many jobs of each stage are in one of the states (all without one)."""
        found: Counter[str] = Counter()
        for path in self.queue.iterdir():
            now, *comment = path.read_text().split()
            if not states or now in states:
                found[comment[2]] += 1
        return found

    def set(self, stage: str, now: str) -> None:
        """The stage's newest job gets another state."""
        path = self.queue / self.run().ledger().jobs[stage]
        _, comment = path.read_text().split(" ", 1)
        path.write_text(f"{now} {comment}")

    def guard(self) -> str:
        """What the guard's job says."""
        done = self.python("-m", "jobs.guard", str(self.run().path))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def life(self, stage: str, number: int, outcome: str = "", *, settled: bool = False, code: int = 137) -> None:
        """A life of a stage; `settled`: its epilogue ran, on a site that forbids requeueing."""
        run = self.run()
        job = run.ledger().jobs[stage]
        now = int(time.time())
        (run.lives / f"{stage}-{number}").write_text(f"{job} n1 {now} \n")
        with (self.queue.parent / "lives").open("a") as accounting:
            accounting.write(f"{job}|FAILED|0:9|{now}|{now}\n")
        if outcome:
            (run.outcomes / f"{stage}-{number}").write_text(outcome + "\n")
        if settled:
            words = ("end", str(run.path), stage, str(number), str(code), job, f"{run.slurm}/{stage}/{job}_0_log.out")
            assert self.python("-m", "ftlib.slurm.attempt", *words, FT_REQUEUE="0", SLURM_JOB_ID=job).returncode == 0


ONE_EACH = Counter(["prepare", "train", "export+evaluate", "guard"])


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_submit_queues_each_stage_once_and_again_says_that_it_is_on_its_way(login: Login) -> None:
    assert login.submit().returncode == 0
    again = login.submit()
    assert again.returncode == 0 and "is on its way" in again.stdout
    assert login.jobs() == ONE_EACH


def adopted(login: Login, job: str) -> None:
    """The next submit takes in the orphan and queues only the rest."""
    done = login.submit()
    assert done.returncode == 0, done.stderr
    assert "Found the job of prepare" in done.stdout
    assert login.jobs() == ONE_EACH
    run = login.run()
    assert run.ledger().jobs["prepare"] == job
    assert not (run.path / "writer").exists()


def test_a_submit_killed_between_its_intent_and_the_answer_is_adopted(login: Login) -> None:
    assert login.submit(KILL_PARENT="1").returncode == -9
    assert login.jobs() == Counter(["prepare"])
    assert "prepare" not in login.run().ledger().jobs
    adopted(login, "101")


def test_the_job_of_two_stages_is_adopted_for_both(login: Login) -> None:
    assert login.submit(KILL_PARENT="103").returncode == -9
    assert login.jobs() == Counter(["prepare", "train", "export+evaluate"])
    done = login.submit()
    assert done.returncode == 0, done.stderr
    assert "Found the job of export " in done.stdout and "Found the job of evaluate " in done.stdout
    assert login.jobs() == ONE_EACH
    jobs = login.run().ledger().jobs
    assert jobs["export"] == jobs["evaluate"] == "103"
    assert login.python("-m", "jobs", "cancel", "--run", login.run().name).returncode == 0
    assert login.jobs("CANCELLED")["export+evaluate"] == 1


def test_an_orphan_that_has_failed_meanwhile_is_replaced(login: Login) -> None:
    """Only a job that can still run stands for its stage."""
    login.submit(KILL_PARENT="1")
    (login.queue / "101").write_text("FAILED" + (login.queue / "101").read_text().removeprefix("PENDING"))
    assert login.submit().returncode == 0
    assert login.jobs("PENDING") == ONE_EACH


def test_two_submits_at_once_make_one_run(login: Login) -> None:
    wish = [sys.executable, "-m", "jobs", "submit", "--cluster", "local-slurm", "--set", SETTINGS]
    options: dict[str, Any] = {"cwd": login.checkout, "env": {**login.env, "SLOW": "0.2"}, "stdout": -1, "stderr": -1}
    with started(wish, **options) as one, started(wish, **options) as other:
        both = one, other
        said = [process.communicate(timeout=120) for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 64]), said
    assert codes == [0, 0] or any("another process" in err for _, err in said)
    assert len(run_names(login.checkout)) == 1
    assert login.jobs() == ONE_EACH


def test_resume_queues_only_what_is_missing(login: Login) -> None:
    login.submit()
    run = login.run()
    login.life("prepare", 1, "0 packed")
    login.set("prepare", "COMPLETED")
    login.set("train", "FAILED")
    login.set("export", "CANCELLED")
    login.set("evaluate", "CANCELLED")
    for _ in range(2):
        assert login.python("-m", "jobs", "resume", "--run", run.name).returncode == 0
    assert login.jobs("PENDING") == Counter({"train": 1, "export+evaluate": 1, "guard": 2})
    assert login.jobs()["prepare"] == 1


def test_a_run_of_an_earlier_version_goes_on_and_a_spoilt_profile_is_named(login: Login) -> None:
    login.submit()
    run = login.run()
    for stage in (*STAGES, RECOVERY):
        login.set(stage, "CANCELLED")
    kept = run.provenance()
    kept["profile"]["scheduler"]["of_an_earlier_version"] = 3
    run.provenance_file.write_text(json.dumps(kept))
    done = login.python("-m", "jobs", "resume", "--run", run.name)
    assert done.returncode == 0, done.stderr
    assert login.jobs("PENDING")["train"] == 1
    kept["profile"]["scheduler"]["max_jobs"] = "many"
    run.provenance_file.write_text(json.dumps(kept))
    spoilt = login.python("-m", "jobs", "resume", "--run", run.name)
    assert spoilt.returncode == 64 and "scheduler.max_jobs" in spoilt.stderr and "Traceback" not in spoilt.stderr


def test_a_task_that_slurm_lost_sight_of_ends_when_a_later_life_begins(tmp_path: Path) -> None:
    (tmp_path / "lives").mkdir()
    (tmp_path / "lives" / "train-4").touch()
    code = (
        "import sys; from pathlib import Path; from ftlib.rundir import RunDir; from jobs import stage;"
        "stage.leave_when_superseded(RunDir(Path(sys.argv[1])), 'train', 4, every_s=0.05)"
    )
    with started([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        (tmp_path / "lives" / "train-5").touch()
        assert process.wait(timeout=60) == 70


# -- the guard ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(login: Login) -> Login:
    """A run that is in its training."""
    assert login.submit().returncode == 0
    login.life("prepare", 1, "0 packed")
    login.set("prepare", "COMPLETED")
    login.set("train", "RUNNING")
    return login


def ends(login: Login, now: str = "FAILED") -> None:
    """The training's job is over, and Slurm has removed what waited for it."""
    login.set("train", now)
    login.set("export", "CANCELLED")
    login.set("evaluate", "CANCELLED")


def test_the_guard_goes_on_where_the_site_forbids_requeueing(training: Login) -> None:
    training.life("train", 1, "75 interrupted (time limit), saved at step 40", settled=True)
    ends(training)
    assert training.guard().startswith("queued anew: train ")
    assert training.jobs("PENDING") == Counter({"train": 1, "export+evaluate": 1, "guard": 2})


def requested(login: Login) -> dict[str, str]:
    """sbatch's options in the script of the training's newest job."""
    run = login.run()
    text = (run.slurm / "train" / f"{run.ledger().jobs['train']}_submission.sh").read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))


def test_what_was_learned_and_changed_reaches_the_jobs_of_the_guard_and_of_a_resume(training: Login) -> None:
    """Memory that grew was lost where requeueing is forbidden; a changed QOS was ignored."""
    assert (requested(training)["mem"], requested(training)["qos"]) == ("6G", "group")
    training.life("train", 1, "75 interrupted (time limit), saved at step 40", settled=True)
    training.run().record(Override(field="memory_mib.train", value=9 * 1024, who="epilogue", why="out of memory"))
    ends(training)
    assert training.guard().startswith("queued anew: train ")
    assert (requested(training)["mem"], requested(training)["qos"]) == ("9G", "group")
    submitted = training.run().ledger().submissions["train"]
    assert (submitted.mem_mib, submitted.node_mem_mib) == (9 * 1024, 60 * 1024)
    ends(training, "CANCELLED")
    words = ("-m", "jobs", "resume", "--run", training.run().name, "--set")
    typo = training.python(*words, "cluster.qso=group-b cluster.exclude=n[1-2]")
    assert typo.returncode == 64 and "Did you mean qos?" in typo.stderr
    resumed = training.python(*words, "cluster.qos=group-b cluster.exclude=n[1-2]")
    assert resumed.returncode == 0, resumed.stderr
    now = requested(training)
    assert (now["mem"], now["qos"], now["exclude"].strip("'")) == ("9G", "group-b", "n[1-2]")


def test_the_guard_is_not_stopped_by_the_claim_of_a_submit_that_was_killed(training: Login) -> None:
    training.life("train", 1, "75 interrupted (time limit), saved at step 40", settled=True)
    ends(training)
    claim = training.run().path / "writer"
    claim.write_text("login2 4711")
    os.utime(claim, (time.time() - 3600,) * 2)
    assert training.guard().startswith("queued anew: train ")
    assert not claim.exists()


def test_the_guard_goes_on_where_the_batch_shell_was_killed_but_not_for_ever(training: Login) -> None:
    for number in (1, 2):
        training.life("train", number)
        ends(training)
        assert training.guard().startswith("queued anew: train ")
        training.set("train", "RUNNING")
    training.life("train", 3)
    ends(training)
    assert "attempts in a row failed" in training.guard()
    assert training.jobs("PENDING", "RUNNING")["train"] == 0


def test_the_guard_leaves_alone_what_an_epilogue_has_stopped(training: Login) -> None:
    training.life("train", 1, "64 train.jsonl, line 3: has no field 'prompt'", settled=True, code=64)
    ends(training)
    assert "the input is wrong" in training.guard()
    assert training.jobs("PENDING", "RUNNING")["train"] == 0


def test_the_guard_goes_on_where_slurm_cancelled_what_waited_for_a_done_stage(training: Login) -> None:
    """The stage had written its outcome when its batch shell was killed: its job is FAILED, and nobody cancelled."""
    training.life("train", 1, "0 trained 40 steps")
    ends(training)
    assert training.guard().startswith("queued anew: export ")
    assert training.jobs("PENDING") == Counter({"export+evaluate": 1, "guard": 2})


@pytest.fixture
def exported(training: Login) -> Login:
    """A run whose evaluation's turn has come, in the job of the export."""
    training.life("train", 1, "0 trained 40 steps")
    training.set("train", "COMPLETED")
    training.set("export", "RUNNING")
    training.life("export", 1, "0 exported the adapter")
    return training


def test_after_a_batch_shell_that_was_killed_between_two_stages_the_second_runs_alone(exported: Login) -> None:
    exported.set("evaluate", "FAILED")
    assert exported.guard().startswith("queued anew: evaluate ")
    assert exported.jobs("PENDING") == Counter({"evaluate": 1, "guard": 2})


def test_a_failed_evaluation_is_resumed_alone(exported: Login) -> None:
    exported.life("evaluate", 1, "64 its base is gone", settled=True, code=64)
    exported.set("evaluate", "FAILED")
    assert "evaluate was stopped" in exported.guard() and exported.jobs("PENDING")["evaluate"] == 0
    done = exported.python("-m", "jobs", "resume", "--run", exported.run().name)
    assert done.returncode == 0 and "Continuing at evaluate (its base is gone)" in done.stdout, done.stderr
    assert exported.jobs("PENDING") == Counter({"evaluate": 1, "guard": 2})


def test_a_job_cancelled_in_its_second_stage_is_not_revived(exported: Login) -> None:
    exported.set("evaluate", "CANCELLED")
    assert "evaluate was cancelled by its owner" in exported.guard()


@pytest.mark.parametrize("by", ["scancel", "make cancel"])
def test_the_guard_never_revives_what_its_owner_cancelled(training: Login, by: str) -> None:
    if by == "scancel":
        ends(training, "CANCELLED")
    else:
        training.life("train", 1, "75 interrupted (preemption), saved at step 40")
        assert training.python("-m", "jobs", "cancel", "--run", training.run().name).returncode == 0
    for _ in range(2):
        assert "was cancelled by its owner" in training.guard()
    assert training.jobs("PENDING", "RUNNING")["train"] == 0


def test_jobs_that_end_before_they_begin_stop_after_three(training: Login) -> None:
    said = []
    for _ in range(3):
        ends(training)
        said.append(training.guard())
    assert [words.startswith("queued anew") for words in said] == [True, True, False]
    assert "ended before they began" in said[-1]
    decisions = training.run().ledger().of(Decided, "train")
    assert [decided.choice for decided in decisions] == ["queue anew", "queue anew", "stop"]


def test_the_guard_does_nothing_while_the_job_waits_or_runs_or_all_is_done(training: Login) -> None:
    assert training.guard() == "train is running"
    for stage in STAGES:
        training.life(stage, 2, "0 done")
    assert training.guard() == "every stage is done"
