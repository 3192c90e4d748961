"""The sbatch scripts, to the letter, and the shell that runs around a stage.

`python -m tests.test_batch` writes the golden files anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftlib import modelfiles
from ftlib.errors import InputError
from ftlib.slurm import batch, container
from jobs import chain
from tests.processes import started
from tests.wishes import CHECKOUT, planned, site, spec

GOLDEN = Path(__file__).parent / "golden"
RUN = Path("/blue/lab/ada/it's \"mine\"/runs/llama2-7b-0123abcd")
IMAGE = {"module": "apptainer", "image": "/blue/{account}/i.sif", "binds": ["/blue/{account}"]}
CASES = {
    "llama2-7b.hipergator": ("llama2-7b", "hipergator", {"account": "lab", "container": IMAGE}),
    "llama2-7b.a100": ("llama2-7b", "a100", {"exclude": "bad1", "mail_user": "ada@example.org"}),
    "tiny.local-slurm": ("tiny", "local-slurm", {}),
}


def text(case: str) -> str:
    model, cluster, changes = CASES[case]
    profile = site(cluster, python="/opt/env/bin/python", **changes)
    cache = Path("/blue/lab/ada/.cache/ftlib")
    said = {"cache": str(cache), "checkout": str(CHECKOUT)}
    made = chain.scripts(profile, planned(spec(model), profile), run=RUN, provenance=said)
    whole = "\n".join(f"===== {name} =====\n{script}" for name, script in made)
    # Neither this machine's folders, as the shell reads them, nor the locks of the day.
    for folder in (shlex.quote(str(CHECKOUT)), str(CHECKOUT)):
        whole = whole.replace(folder, "/checkout")
    return whole.replace(container.lock(CHECKOUT / "env"), "LOCK")


@pytest.mark.parametrize("case", CASES)
def test_scripts_to_the_letter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere/token")  # not of the person who runs the tests
    assert text(case) == (GOLDEN / f"{case}.txt").read_text()


@pytest.mark.parametrize("bad", ["a\nb", "a%jb"])
def test_a_path_that_sbatch_cannot_be_told_is_refused(bad: str) -> None:
    with pytest.raises(InputError, match="Move the checkout"):
        batch.check_path(Path("/x") / bad)


def test_a_persons_hf_home_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/theirs")
    assert modelfiles.hf_home(Path("/cache")) == Path("/theirs")


def test_the_token_of_a_login_is_named_by_its_path_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    profile, cache = site("a100"), tmp_path / "cache"
    plan = planned(spec("llama2-7b"), profile)

    def variables() -> dict[str, str]:
        return batch.environment(profile, plan, "prepare", run=None, cache=cache)

    assert "HF_TOKEN_PATH" not in variables()
    token = tmp_path / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret")
    assert variables()["HF_TOKEN_PATH"] == str(token) and "hf_secret" not in str(variables())
    # A person's own HF_HOME does not move.
    monkeypatch.setenv("HF_HOME", str(token.parent))
    assert "HF_TOKEN_PATH" not in variables()


def test_only_prepare_may_reach_the_hub() -> None:
    for name in ("a100", "local-slurm"):
        profile = site(name)
        plan = planned(spec("llama2-7b"), profile)
        for closed in (profile, profile.model_copy(update={"compute_internet": False})):
            for stage in ("prepare", "train", "export", "evaluate"):
                made = batch.environment(closed, plan, stage, run=None, cache=Path("/c"))
                offline = stage != "prepare" or not closed.compute_internet
                assert made.get("HF_HUB_OFFLINE") == ("1" if offline else None)


SCONTROL = """#!/bin/bash
[ "$1" = listpids ] && exit 1  # no step is seen
if [ "$1" = show ]; then echo "JobId=7 JobState=$STATE $TOLD"; exit 0; fi
# A change that changes nothing: accepted of a job that goes back to the queue.
[ "$3" = Requeue=1 ] && { [ -z "$NOT_REQUEUED" ]; exit; }
echo "$@" >>"$CALLS"
[ "$1" = update ] && exit 0
n=$(($(cat "$CALLS.n" 2>/dev/null || echo 0) + 1)); echo $n >"$CALLS.n"
[ "$n" -gt "${REFUSE:-0}" ] && [ "$2" = Incomplete ]
"""


# The prologue's and epilogue's pauses are skipped; the step watch, a process of its own, would spin without its.
SLEEP = """#!/bin/bash
! grep -qz watch.sh /proc/$PPID/cmdline || exec /bin/sleep "$@"
"""
MODULE = """
module() {
    case "$1 $2" in
    "load lua") export LD_LIBRARY_PATH=/lua ;;
    "load silent") echo "silent(3):ERROR:105: Unable to locate a modulefile for 'silent'" >&2 ;; # Tcl's, and 0
    load*) echo "Lmod has detected the following error: The following module(s) are unknown: \"$2\"" >&2; return 1 ;;
    esac
}
"""


@pytest.fixture
def shell(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs prologue, a command in srun's place, and epilogue; Slurm's commands and sleep are shims on PATH.

    A real sacct without a configuration would ask DNS for one, which takes long where no name server answers.
    """
    run = tmp_path / "a b's run"
    for folder in ("events", "outcomes", "lives", "slurm/train"):
        (run / folder).mkdir(parents=True)
    (run / "plan.json").write_text('{"micro_batch": 8, "accumulation": 2}')
    tools = tmp_path / "bin"
    tools.mkdir()
    shims = {"scontrol": SCONTROL, "sleep": SLEEP, "squeue": "#!/bin/bash\n", "sacct": "#!/bin/sh\nexit 1\n"}
    for name, body in shims.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)

    def go(command: str, *, before: str = "", after: str = "", **environment: str) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        Path(f"{calls}.n").unlink(missing_ok=True)
        script = f"{before}\n. slurm_templates/prologue.sh\n{command}\n. slurm_templates/epilogue.sh\n{after}"
        said = {"FT_RUN": str(run), "FT_STAGE": "train", "FT_REQUEUE": "1", "SLURM_JOB_ID": "7", "CALLS": str(calls)}
        said["FT_PYTHON"] = sys.executable
        # Not into a pipe: what the shell leaves in the background would hold it open, and this would wait for that.
        with (tmp_path / "log").open("a") as out:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=CHECKOUT,
                env={**os.environ, **said, "STATE": "RUNNING", "PATH": f"{tools}:{os.environ['PATH']}", **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return go


def says(code: int) -> str:
    return f'echo "{code} words" >"$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE"; (exit 143)'


def test_done_ends_well_whatever_srun_returned(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(0)) == (0, [])


def test_two_stages_share_a_job_each_with_its_attempt_step_and_log(shell, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loop = batch.begin(("export", "evaluate"), time_min=30)[:-1]  # the fixture has the prologue
    before = "\n".join(['mkdir -p "$FT_RUN/slurm/export" "$FT_RUN/slurm/evaluate"', *loop])
    work = """echo "log of $FT_STAGE"; echo "$FT_STAGE $FT_LIFE $FT_STEP" >>"$FT_RUN/order"
    case $FT_STAGE-$FT_LIFE in evaluate-1) code=75 ;; *) code=0 ;; esac
    echo "$code words" >"$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE"; (exit 143)"""
    (run,) = tmp_path.glob("*run")
    # The evaluation is interrupted, and the requeued job resumes there; after that nothing is left to do.
    assert shell(work, before=before, after="done\n") == (75, ["requeue Incomplete 7"])
    assert shell(work, before=before, after="done\n") == (0, [])
    assert shell(work, before=before, after="done\n") == (0, [])
    assert (run / "order").read_text().splitlines() == ["export 1 0", "evaluate 1 1", "evaluate 2 0"]
    logs = {stage: (run / "slurm" / stage / "7_0_log.out").read_text() for stage in ("export", "evaluate")}
    assert logs["export"].startswith("ftlib: start 1 of job 7, on ") and logs["export"].endswith("\nlog of export\n")
    assert logs["evaluate"].count("log of evaluate\n") == 2 and "interrupted" not in logs["export"]


def test_wrong_input_stops(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(64)) == (64, [])


def test_saved_is_requeued_and_a_cancelled_job_left_alone(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(75)) == (75, ["requeue Incomplete 7"])
    assert shell(says(75), STATE="CANCELLED") == (143, [])


def test_a_requeue_that_slurm_accepts_without_effect_is_left_to_the_recovery_job(shell) -> None:  # type: ignore[no-untyped-def]
    """As of a job that was cancelled a moment ago, or whose time limit is over (Slurm 22.05)."""
    assert shell(says(75), NOT_REQUEUED="1") == (75, ["requeue Incomplete 7"])


def test_a_superseded_life_requeues_nothing(shell) -> None:  # type: ignore[no-untyped-def]
    later = 'echo "7 n2" >"$FT_RUN/lives/$FT_STAGE-$((FT_LIFE + 1))"; '
    assert shell(later + says(75)) == (75, [])


def test_an_absent_controller_is_asked_again(shell) -> None:  # type: ignore[no-untyped-def]
    code, calls = shell(says(75), REFUSE="2")
    assert (code, calls.count("requeue Incomplete 7")) == (75, 3)


def test_a_task_of_an_array_requeues_itself_alone(shell) -> None:  # type: ignore[no-untyped-def]
    calls = shell(says(75), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")[1]
    assert calls == ["requeue Incomplete 7_3"]


def test_a_site_that_forbids_requeueing_is_obeyed(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(75), FT_REQUEUE="0") == (75, [])


def test_interruptions_before_a_word_could_be_said_are_requeued_but_not_for_ever(shell) -> None:  # type: ignore[no-untyped-def]
    preempted = "StartTime=1 EndTime=9999999999 PreemptTime=1700000000"
    assert [shell("(exit 143)", TOLD=preempted)[0] for _ in range(11)] == [75] * 9 + [143] * 2


def test_interruptions_by_nobody_knows_whom_are_as_free_as_preemptions(shell) -> None:  # type: ignore[no-untyped-def]
    """Where there is no accounting they mostly are preemptions."""
    assert [shell("(exit 143)")[0] for _ in range(11)] == [75] * 9 + [143] * 2


def test_a_prologue_asks_before_the_first_attempt_and_again_without_an_answer(shell, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The one that asks may be killed; what it would have been told may be that the run was cancelled."""
    python = tmp_path / "python"
    asked = shlex.quote(f"{tmp_path}/asked")
    python.write_text(f'#!/bin/sh\necho "$@" >>{asked}\n[ $(wc -l <{asked}) = 1 ] || echo exit 9\n')
    python.chmod(0o755)
    assert shell(says(0), FT_PYTHON=str(python)) == (9, [])
    (run,) = tmp_path.glob("*run")
    assert (tmp_path / "asked").read_text() == 2 * f"-m ftlib.slurm.attempt begin {run} train 1 7\n"
    assert not list((run / "lives").iterdir())


def test_no_outcome_is_never_done(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell("(exit 0)") == (75, ["requeue Incomplete 7"])


def test_a_kill_is_tried_again_twice_and_a_stopped_run_does_not_begin(shell) -> None:  # type: ignore[no-untyped-def]
    killed = 'echo "srun: error: n1: task 0: Killed" >>"$FT_LOG"; (exit 137)'
    assert [shell(killed)[0] for _ in range(3)] == [75, 75, 137]
    assert shell(says(0))[0] == 137


def test_a_bad_gpu_is_requeued_first_and_its_node_left_out_then(shell) -> None:  # type: ignore[no-untyped-def]
    code, calls = shell(says(76), SLURMD_NODENAME="n2")
    assert (code, calls) == (75, ["requeue Incomplete 7", "update JobId=7 ExcNodeList=n2"])


def test_host_memory_that_ran_out_is_asked_for_half_again(shell) -> None:  # type: ignore[no-untyped-def]
    words = 'echo "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0" >>"$FT_LOG"; (exit 137)'
    code, calls = shell(words, SLURM_MEM_PER_NODE="4000")
    assert (code, calls) == (75, ["requeue Incomplete 7", "update JobId=7 MinMemoryNode=6000"])


def test_nothing_is_held_while_a_new_try_waits(shell) -> None:  # type: ignore[no-untyped-def]
    words = 'echo "OSError: [Errno 116] Stale file handle" >>"$FT_LOG"; (exit 1)'
    assert shell(words) == (75, ["requeue Incomplete 7", "update JobId=7 StartTime=now+30"])


def test_what_follows_the_requeue_outlives_the_sigterm_that_slurm_then_sends(shell, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """slurmd sends it to every process of the batch shell, so to the scontrol that excludes the node, too."""
    warned = SCONTROL.replace('echo "$@" >>"$CALLS"', '[ "$1" != update ] || kill -TERM $$\necho "$@" >>"$CALLS"')
    (tmp_path / "bin" / "scontrol").write_text(warned)
    code, calls = shell(says(76), SLURMD_NODENAME="n2")
    assert (code, calls) == (75, ["requeue Incomplete 7", "update JobId=7 ExcNodeList=n2"])


def test_the_step_watch_does_not_hold_the_jobs_output(shell) -> None:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    assert shell('grep -qz watch.sh /proc/$FT_WATCH/cmdline; kill -STOP "$FT_WATCH"; ' + says(0)) == (0, [])
    assert time.monotonic() - began < 15  # its end is not waited for


@pytest.mark.parametrize("module", ["nosuch/1", "silent"])
def test_a_module_that_cannot_be_loaded_ends_the_stage_and_says_so(shell, tmp_path: Path, module: str) -> None:  # type: ignore[no-untyped-def]
    load = f"{MODULE}\n. slurm_templates/modules.sh lua {module} lua"
    assert shell("echo ran >>$CALLS", before=load, SLURMD_NODENAME="n2") == (64, [])
    words = (tmp_path / "a b's run" / "outcomes" / "train-1").read_text()
    assert words.startswith(f"64 module load {module} failed on n2: ") and "make resume RUN=" in words
    assert ("unknown" if module == "nosuch/1" else "Unable to locate") in words


def test_a_module_replaces_what_the_login_shell_had(shell, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    unset = f"unset {' '.join(batch.NOT_INHERITED)}"
    for name, load, found in (("a", ". slurm_templates/modules.sh lua", "/lua"), ("b", "", "")):
        said = tmp_path / name
        shell(f'echo "$LD_LIBRARY_PATH" >{said}; {says(0)}', before=f"{unset}\n{MODULE}\n{load}", LD_LIBRARY_PATH="/x")
        assert said.read_text() == f"{found}\n"


WATCH_SCONTROL = """#!/bin/bash
echo "$@" >>"$CALLS"
echo "PID JOBID STEPID LOCALID GLOBALID"
echo "1 7 batch 0 0"
[ ! -e "$CALLS.step" ] || echo "2 7 0 0 0"
"""


def test_a_step_that_is_seen_costs_no_look_at_the_nodes_processes(tmp_path: Path) -> None:
    """The node's own slurmd is asked; /proc is searched only once the step is missed, and then the step is ended."""
    calls, tools = tmp_path / "calls", tmp_path / "bin"
    tools.mkdir()
    for name, body in {"scontrol": WATCH_SCONTROL, "find": '#!/bin/bash\necho find >>"$CALLS"\n'}.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)
    Path(f"{calls}.step").touch()
    (tmp_path / "outcomes").mkdir()
    said = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "FT_RUN": str(tmp_path), "FT_STAGE": "train"}
    said |= {"FT_LIFE": "1", "FT_JOB": "7", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "FT_WATCH_S": "3"}
    log = tmp_path / "log"
    command = ["bash", "slurm_templates/watch.sh", str(os.getpid()), str(log), "0"]
    with started(command, cwd=CHECKOUT, env={**os.environ, **said}) as watch:
        time.sleep(5)
        seen = calls.read_text().splitlines()
        assert seen and set(seen) == {"listpids 7 n1"} and len(seen) <= 3
        Path(f"{calls}.step").unlink()
        watch.wait(timeout=30)
        assert "slurmstepd is gone" in log.read_text() and "find" in calls.read_text()

def test_a_step_watch_ends_with_its_batch_shell(tmp_path: Path) -> None:
    """Where the batch shell was killed and the controller has forgotten the job, nothing says that the step is gone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/bash\n[ -e "$STEP" ] && printf "1 7 batch 0 0\\n2 7 0 0 0\\n"\n')
    (tools / "scontrol").chmod(0o755)
    step = tmp_path / "step"
    step.touch()
    said = {"PATH": f"{tools}:{os.environ['PATH']}", "STEP": str(step), "FT_RUN": str(tmp_path), "FT_STAGE": "train"}
    said |= {"FT_LIFE": "1", "FT_JOB": "7", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "FT_WATCH_S": "1"}
    with started(["sleep", "60"]) as shell:
        command = ["bash", "slurm_templates/watch.sh", str(shell.pid), str(tmp_path / "log"), "0"]
        with started(command, cwd=CHECKOUT, env={**os.environ, **said}) as watch:
            time.sleep(2)
            assert watch.poll() is None
            step.unlink()
            shell.kill()
            shell.wait(timeout=10)
            watch.wait(timeout=20)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    os.environ.pop("HF_HOME", None)
    os.environ["HF_TOKEN_PATH"] = "/nowhere/token"
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(text(name))
