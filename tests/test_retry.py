"""A controller that is busy, restarts or answers too late: tried again, aloud, and never two jobs for one."""

# ruff: noqa: F811 - the fixture's name is the argument's
from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.errors import Unavailable
from ftlib.slurm import client, retry
from ftlib.slurm.client import Job, Refused
from tests.array_shims import Login as SweepLogin
from tests.processes import started
from tests.sweeps import queued, seeds, swept
from tests.test_ledger import ONE_EACH, SBATCH, Login, ends, login, training  # noqa: F401

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
COMMENT = "ftlib tiny-1 train 0123456789ab"


class Controller:
    """A Slurm whose sbatch does what `script` says, one word a call: take, lose (take, but the answer is lost), late
    (the same, and squeue sees it after the next call only), or an error."""

    def __init__(self, script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.calls = script, 0
        self.queue: list[Job] = []
        self.on_the_way: list[Job] = []
        self.cancelled: list[str] = []
        self.silent = 0  # squeue's calls that fail
        monkeypatch.setattr(retry, "PAUSES_S", (0.001,))
        monkeypatch.setattr(client, "jobs", self.jobs)
        monkeypatch.setattr(client, "cancel", self.cancelled.extend)

    def jobs(self) -> list[Job]:
        if self.silent:
            self.silent -= 1
            raise Unavailable("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
        return list(self.queue)

    def sbatch(self) -> str:
        does = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        self.queue += self.on_the_way
        self.on_the_way = []
        job = Job("PENDING", comment=COMMENT, id=str(100 + self.calls))
        if does in ("take", "lose"):
            self.queue.append(job)
        if does == "late":
            self.on_the_way.append(job)
        if does in ("lose", "late"):
            raise RuntimeError(TIMED_OUT)
        if does != "take":
            raise RuntimeError(does)
        return job.id

    def submit(self, patience_s: float = 60) -> str:
        return retry.submit(self.sbatch, "train of tiny-1", COMMENT, patience_s=patience_s, before=["7"])


@pytest.mark.parametrize(
    "reason",
    [
        "Socket timed out on send/recv operation",
        "Unable to contact slurm controller (connect failure)",
        "Zero Bytes were transmitted or received",
        "Slurm backup controller in standby mode",
        "Resource temporarily unavailable",
        "Connection refused",
        "",  # killed
    ],
)
def test_a_passing_refusal_is_tried_again_and_said(
    reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"sbatch: error: Batch job submission failed: {reason}" if reason else ""
    controller = Controller([words, words, "take"], monkeypatch)
    assert controller.submit() == "103" and controller.calls == 3
    assert capsys.readouterr().err.count("Trying train of tiny-1 again in") == 2


@pytest.mark.parametrize(
    "reason",
    [
        "Invalid account or account/partition combination specified",
        "Invalid partition name specified",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "QOSMaxSubmitJobPerUserLimit",
        "Requested node configuration is not available",
    ],
)
def test_a_real_refusal_ends_at_once_with_slurms_own_words(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller([f"sbatch: warning: x\nsbatch: error: Batch job submission failed: {reason}"], monkeypatch)
    with pytest.raises(Refused, match="sbatch refused train of tiny-1") as error:
        controller.submit()
    assert reason in str(error.value) and controller.calls == 1


def test_a_job_whose_answer_was_lost_is_found_not_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(["lose"], monkeypatch)
    controller.queue.append(Job("RUNNING", comment=COMMENT, id="7"))  # one that had the comment before
    controller.silent = 3
    assert controller.submit() == "101"
    assert controller.calls == 1 and controller.silent == 0


def test_while_squeue_is_silent_too_nothing_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(["lose"], monkeypatch)
    controller.silent = 10**9
    with pytest.raises(Refused, match="Unable to contact"):
        controller.submit(patience_s=0.05)
    assert controller.calls == 1


def test_a_call_that_reaches_the_controller_late_leaves_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(["late", "take"], monkeypatch)
    assert controller.submit() == "101"
    assert controller.cancelled == ["102"]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller([TIMED_OUT], monkeypatch)
    with pytest.raises(Refused, match=r"Socket timed out .* \(tried for 0 min\)"):
        controller.submit(patience_s=0.05)
    assert controller.calls > 1


def test_questions_are_patient_too_but_not_without_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(["take"], monkeypatch)
    controller.silent = 2
    assert retry.patiently(client.jobs, patience_s=60) == []

    def no_command() -> None:
        raise client.NoSuchCommand("squeue: there is no such command here")

    with pytest.raises(client.NoSuchCommand):
        retry.patiently(no_command, patience_s=60)


# -- in a run, a recovery job and a sweep ------------------------------------------------------------------------------

# The n-th sbatch call fails: before it has queued the job, or ("lost") after that.
BUSY = """calls=$(($(cat "$QUEUE/../calls" 2>/dev/null || echo 0) + 1)); echo $calls >"$QUEUE/../calls"
case " $FAIL " in *" $calls "*) echo "sbatch: error: Batch job submission failed: $REASON" >&2; exit 1 ;; esac
"""
LOST = """case " $LOST " in *" $calls "*) echo "sbatch: error: $REASON" >&2; exit 1 ;; esac
"""
REASON = "Unable to contact slurm controller (connect failure)"
QUICK = "from ftlib.slurm import retry; retry.PAUSES_S = (0.05,); import sys\n"


def make_busy(login: Login) -> None:
    lines = SBATCH.splitlines(keepends=True)
    (login.queue.parent / "bin" / "sbatch").write_text("#!/bin/bash\n" + BUSY + "".join(lines[:-1]) + LOST + lines[-1])


def submit(login: Login, **environment: str) -> subprocess.CompletedProcess[str]:
    words = ["submit", "--cluster", "local-slurm", "--set", "data.pairs=600 tracking.mode=disabled"]
    code = f"{QUICK}from jobs import cli; sys.exit(cli.main({words}))"
    return login.python("-c", code, REASON=REASON, **environment)


def test_a_submit_outlasts_a_restart_of_the_controller(login: Login) -> None:
    make_busy(login)
    done = submit(login, FAIL="1 2 4 7", LOST="5")
    assert done.returncode == 0, done.stderr
    assert login.jobs() == ONE_EACH
    assert done.stderr.count("Trying ") == 5 and "has queued train of" in done.stderr
    # Each is written down under the id that it has.
    ids = {path.name for path in login.queue.iterdir()}
    assert set(login.run().ledger().jobs.values()) == ids


def test_a_refusal_for_good_says_what_is_queued_and_what_to_do(login: Login) -> None:
    make_busy(login)
    words = "Invalid account or account/partition combination specified"
    sbatch = login.queue.parent / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("$REASON", words))
    done = submit(login, FAIL="2")
    assert done.returncode == 1 and words in done.stderr and "Queued before it: prepare" in done.stderr
    assert "Trying" not in done.stderr
    assert (login.queue.parent / "calls").read_text().strip() == "2"


def test_ctrl_c_while_it_waits_leaves_what_the_next_submit_adopts(login: Login) -> None:
    make_busy(login)
    wish = [sys.executable, "-m", "jobs", "submit", "--cluster", "local-slurm", "--set"]
    environment = {**login.env, "REASON": REASON, "LOST": "2"}
    with started(
        [*wish, "data.pairs=600 tracking.mode=disabled"], cwd=login.checkout, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list(login.queue.iterdir())) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert process.stderr is not None
        while "Trying" not in (line := process.stderr.readline()):
            assert line, "it ended"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "Run the same command again" in said and "Traceback" not in said
    done = submit(login)
    assert done.returncode == 0, done.stderr
    assert "Found the job of train" in done.stdout and login.jobs() == ONE_EACH


def guard(login: Login, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"{QUICK}from jobs import guard; sys.exit(guard.main({str(login.run().path)!r}))"
    return login.python("-c", code, REASON=REASON, **environment)


def test_the_recovery_job_outlasts_a_restart_of_the_controller(training: Login) -> None:
    training.life("train", 1, "75 interrupted (time limit), saved at step 40", settled=True)
    ends(training)
    make_busy(training)
    squeue = training.queue.parent / "bin" / "squeue"
    once = f'[ -e "$QUEUE/../asked" ] || {{ touch "$QUEUE/../asked"; echo "{REASON}" >&2; exit 1; }}\n'
    squeue.write_text(squeue.read_text().replace("#!/bin/bash\n", "#!/bin/bash\n" + once))
    done = guard(training, FAIL="1", LOST="3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("queued anew: train ") and done.stderr.count("Trying ") == 3
    assert training.jobs("PENDING") == Counter({"train": 1, "export+evaluate": 1, "guard": 2})


@pytest.mark.parametrize(("sacct", "again"), [("storage is disabled", True), ("Connection refused", False)])
def test_the_recovery_job_without_accounting(training: Login, sacct: str, again: bool) -> None:
    """Disabled it knows nothing, and squeue's word counts; where it fails, how a forgotten job ended is not guessed."""
    training.life("train", 1, "75 interrupted (time limit), saved at step 40", settled=True)
    ends(training)
    (training.queue / training.run().ledger().jobs["train"]).unlink()
    tool = training.queue.parent / "bin" / "sacct"
    tool.write_text(f"#!/bin/sh\necho 'Slurm accounting {sacct}' >&2; exit 1\n")
    code = f"{QUICK}retry.RECOVERY_S = 0.2; from jobs import guard; sys.exit(guard.main({str(training.run().path)!r}))"
    done = training.python("-c", code)
    assert "Traceback" not in done.stderr
    if again:
        assert done.returncode == 0 and done.stdout.startswith("queued anew: train ")
    else:
        assert done.returncode == 69 and "ended cannot be learned" in done.stdout
        assert "make resume RUN=" in done.stdout and training.jobs("PENDING")["train"] == 0


def test_the_arrays_of_a_sweep_are_queued_once(tmp_path: Path, checkout: Path, file: Callable[..., str]) -> None:
    login = SweepLogin(checkout, tmp_path)
    sbatch = tmp_path / "bin" / "sbatch"
    # Each first call of a kind is lost after it was taken; each second is refused.
    real = sbatch.read_text().splitlines()[-1].removeprefix("exec ")
    sbatch.write_text(f"""#!/bin/sh
calls=$(($(cat {tmp_path}/calls 2>/dev/null || echo 0) + 1)); echo $calls >{tmp_path}/calls
case $((calls % 3)) in
1) {real} >/dev/null; echo "sbatch: error: {TIMED_OUT}" >&2; exit 1 ;;
2) echo "sbatch: error: Zero Bytes were transmitted or received" >&2; exit 1 ;;
esac
{real}
""")
    name = file(seeds(3))
    words = ["sweep", "--sweep", name, "--cluster", "local-slurm", "--set", "tracking.mode=disabled"]
    done = login.python("-c", f"{QUICK}from jobs import cli; sys.exit(cli.main({words}))")
    assert done.returncode == 0, done.stderr
    assert "has queued prepare of 1 points" in done.stderr
    assert queued(login) == Counter({"prepare": 1, "train": 3, "export+evaluate": 3, "feeder": 1})
    swept(login, name)  # nothing is missing
    assert queued(login) == Counter({"prepare": 1, "train": 3, "export+evaluate": 3, "feeder": 1})
