"""The sbatch scripts, to the letter, and the shell that runs around a stage.

`python -m tests.test_batch` writes the golden files anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ftlib import modelfiles
from ftlib.errors import InputError
from ftlib.slurm import batch
from jobs import chain
from tests.wishes import CHECKOUT, planned, site, spec

GOLDEN = Path(__file__).parent / "golden"
RUN = Path("/blue/lab/ada/it's \"mine\"/runs/llama2-7b-0123abcd")
CASES = {
    "llama2-7b.hipergator": ("llama2-7b", "hipergator", {"account": "lab"}),
    "llama2-7b.a100": ("llama2-7b", "a100", {"exclude": "bad1", "mail_user": "ada@example.org"}),
    "tiny.local-slurm": ("tiny", "local-slurm", {}),
}


def text(case: str) -> str:
    model, cluster, changes = CASES[case]
    profile = site(cluster, python="/opt/env/bin/python", **changes)
    cache = Path("/blue/lab/ada/.cache/ftlib")
    made = chain.scripts(profile, planned(spec(model), profile), run=RUN, cache=cache)
    return "\n".join(f"===== {stage} =====\n{script}" for stage, script in made)


@pytest.mark.parametrize("case", CASES)
def test_scripts_to_the_letter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    assert text(case) == (GOLDEN / f"{case}.txt").read_text()


@pytest.mark.parametrize("bad", ["a\nb", "a%jb"])
def test_a_path_that_sbatch_cannot_be_told_is_refused(bad: str) -> None:
    with pytest.raises(InputError, match="Move the checkout"):
        batch.check_path(Path("/x") / bad)


def test_a_persons_hf_home_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/theirs")
    assert modelfiles.hf_home(Path("/cache")) == Path("/theirs")


SCONTROL = """#!/bin/bash
echo "$@" >>"$CALLS"
if [ "$1" = show ]; then echo "JobId=7 JobState=$STATE"; exit 0; fi
n=$(($(cat "$CALLS.n" 2>/dev/null || echo 0) + 1)); echo $n >"$CALLS.n"
[ "$n" -gt "${REFUSE:-0}" ] && { [ "$2" = Incomplete ] || [ "${STATE}" = TIMEOUT ]; }
"""


@pytest.fixture
def shell(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs prologue, a command in srun's place, and epilogue; scontrol and sleep are shims on PATH."""
    run = tmp_path / "a b's run"
    for folder in ("events", "outcomes", "lives", "slurm/train"):
        (run / folder).mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {"scontrol": SCONTROL, "sleep": "#!/bin/bash\nexit 0\n"}.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)

    def go(command: str, **environment: str) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        Path(f"{calls}.n").unlink(missing_ok=True)
        script = f". slurm_templates/prologue.sh\n{command}\n. slurm_templates/epilogue.sh\n"
        said = {"FT_RUN": str(run), "FT_STAGE": "train", "FT_REQUEUE": "1", "SLURM_JOB_ID": "7", "CALLS": str(calls)}
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=CHECKOUT,
            env={**os.environ, **said, "STATE": "RUNNING", "PATH": f"{tools}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return go


def says(code: int) -> str:
    return f'echo "{code} words" >"$FT_RUN/outcomes/$FT_STAGE-$FT_LIFE"; (exit 143)'


def test_done_ends_well_whatever_srun_returned(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(0)) == (0, [])


def test_wrong_input_stops(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(64)) == (64, [])


def test_saved_is_requeued_and_a_cancelled_job_left_alone(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(75)) == (75, ["requeue Incomplete 7"])
    code, calls = shell(says(75), REFUSE="99", STATE="CANCELLED")
    assert (code, calls) == (143, ["requeue Incomplete 7", "show job 7"])


def test_at_the_time_limit_a_plain_requeue_follows(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(75), REFUSE="1", STATE="TIMEOUT")[1] == ["requeue Incomplete 7", "show job 7", "requeue 7"]


def test_an_absent_controller_is_asked_again(shell) -> None:  # type: ignore[no-untyped-def]
    code, calls = shell(says(75), REFUSE="2")
    assert (code, calls.count("requeue Incomplete 7")) == (75, 3)


def test_a_task_of_an_array_requeues_itself_alone(shell) -> None:  # type: ignore[no-untyped-def]
    calls = shell(says(75), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")[1]
    assert calls == ["requeue Incomplete 7_3"]


def test_a_site_that_forbids_requeueing_is_obeyed(shell) -> None:  # type: ignore[no-untyped-def]
    assert shell(says(75), FT_REQUEUE="0") == (75, [])


def test_silent_interruptions_are_requeued_three_times_in_a_row(shell) -> None:  # type: ignore[no-untyped-def]
    assert [shell("(exit 143)")[0] for _ in range(4)] == [75, 75, 75, 143]
    assert shell(says(75))[0] == 75
    assert shell("(exit 140)")[0] == 75


@pytest.mark.parametrize("code", [0, 1, 137])
def test_no_outcome_is_a_failure_even_with_exit_code_0(shell, code: int) -> None:  # type: ignore[no-untyped-def]
    assert shell(f"(exit {code})") == (code or 1, [])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    os.environ.pop("HF_HOME", None)
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(text(name))
