"""The image: what is asked of Apptainer, what passes through its wall, and what is refused before anything runs.

Where an Apptainer is at hand (on PATH, or made by env/local_apptainer.sh) a small real image is built and entered, too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ftlib.errors import FtError, InputError
from ftlib.runs.signatures import from_log
from ftlib.slurm import container
from jobs import image as images
from tests.array_shims import Login
from tests.processes import started
from tests.wishes import CHECKOUT, copied_checkout, jobs, planned, site, spec

LOCAL = Path(os.environ.get("FTLIB_APPTAINER_DIR") or "/tmp/ftlib-apptainer") / "bin" / "apptainer"
APPTAINER = shutil.which("apptainer") or (str(LOCAL) if LOCAL.exists() else None)
real = pytest.mark.skipif(APPTAINER is None, reason="no Apptainer here (as root: sh env/local_apptainer.sh up)")
SHIM = """#!/bin/bash
if [ "$2" = inspect ]; then echo "org.ftlib.lock: ${SHIM_LOCK:-0123}"; exit; fi
printf '%s\\n' "$@"; env | grep '^APPTAINERENV_'
"""
# A root folder of what /bin/sh and env need, and no more.
SMALL = """Bootstrap: {{ BOOTSTRAP }}
From: {{ FROM }}
%labels
    org.ftlib.lock 0123
%post
    true
%test
    echo tested
"""


def test_the_definition_is_whole() -> None:
    text = (CHECKOUT / "env" / "train.def").read_text()
    sections = re.split(r"^%(\w+)", text, flags=re.MULTILINE)
    parts = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert {"arguments", "labels", "files", "environment", "post", "test"} <= parts.keys()
    header = dict(re.findall(r"^(\w+): (.*)$", re.sub(r"(?m)^#.*\n", "", sections[0]), re.MULTILINE))
    assert header == {"Bootstrap": "{{ BOOTSTRAP }}", "From": "{{ FROM }}"}
    assert set(re.findall(r"{{ (\w+) }}", text)) <= set(re.findall(r"^    (\w+)=", parts["arguments"], re.MULTILINE))
    copied = [line.split()[0] for line in parts["files"].strip().splitlines()]
    # What goes into the image is what its name is made of.
    assert sorted([*copied, "train.def"]) == sorted(container.LOCKS + container.DEFINITION)


def test_another_lock_definition_or_base_is_another_image(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "env", tmp_path / "env")
    profile = site("hipergator", account="lab", container={})

    def name(base: str | None = None) -> str:
        section = profile.container and profile.container.model_copy(update={"base": base})
        found = container.image(profile.model_copy(update={"container": section}), tmp_path)
        assert found is not None
        return Path(found["path"]).name

    names = [name(), name("/base")]
    for file in ("train.lock", "torch.txt", "train.def", "image_test.py"):
        with (tmp_path / "env" / file).open("a") as opened:
            opened.write("# newer\n")
        names.append(name())
    assert len(set(names)) == len(names) and name() == names[-1]


def test_gpu_stages_alone_get_the_driver_and_what_lies_elsewhere_is_bound() -> None:
    profile = site("a100", container={"image": "/i.sif"})
    plan = planned(spec("llama2-7b"), profile)
    inside, lock = str(CHECKOUT), container.lock(CHECKOUT / "env")
    said = {"checkout": inside, "init_adapter": f"{inside}/runs/a", "data_path": "/d/x y"}

    def words(stage: str, **other: str) -> list[str]:
        runs = [{**said, "model_path": "meta-llama/x", **changed} for changed in ({}, other)]
        return shlex.split(container.worker(profile, plan, stage, *runs))

    start = ["bash", "slurm_templates/container.sh", "apptainer", "/i.sif", lock]
    assert words("prepare") == [*start, "/d/x y", inside, "--", "python"]
    assert words("train") == [*start, "--nv", "/d/x y", inside, "--", "python"]
    # The runs of an array need not read the same file, nor have the same base.
    others = ["/d/x y", "/d/z", "/m/base", inside]
    assert words("prepare", data_path="/d/z", model_path="/m/base") == [*start, *others, "--", "python"]


Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Run]:
    """Starts container.sh as srun would, in a run folder with a hard name; Apptainer is a shim, or the real one.

    What a test leaves running ends with it.
    """
    run = tmp_path / "it's \"my\", $run: `x`"
    for folder in ("outcomes", "code"):
        (run / folder).mkdir(parents=True)
    shim = tmp_path / "shim"
    shim.write_text(SHIM)
    shim.chmod(0o755)
    (tmp_path / "i.sif").touch()

    def start(*words: str, apptainer: str = str(shim), image: str = str(tmp_path / "i.sif"), **env: str) -> object:
        said = {"FT_RUN": str(run), "FT_STAGE": "train", "FT_LIFE": "1", "SLURM_JOB_ID": "7", "HF_TOKEN": "geheim"}
        script = str(CHECKOUT / "slurm_templates" / "container.sh")
        process = started(
            ["bash", script, apptainer, image, "0123", *words],
            cwd=run / "code", env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **said, **env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return running.enter_context(process)

    start.run = run  # type: ignore[attr-defined]
    with ExitStack() as running:
        yield start  # type: ignore[misc]


def outcome(task: Run) -> str:
    return str((task.run / "outcomes" / "train-1").read_text())  # type: ignore[attr-defined]


def test_nothing_passes_but_what_is_named_and_no_token_is_on_the_command_line(task: Run, tmp_path: Path) -> None:
    env = {"FT_PASS": "OMP_NUM_THREADS", "OMP_NUM_THREADS": "2", "PYTHONPATH": "/mine", "NCCL_DEBUG": "a b,c\"'$d"}
    said, _ = task("--nv", "/usr", "--", "python", "-u", TRITON_CACHE_DIR="/shared", **env).communicate(timeout=20)
    lines = said.splitlines()
    assert lines[:4] == ["--nocolor", "--quiet", "exec", "--cleanenv"]
    passed = {line.partition("=")[0][len("APPTAINERENV_") :] for line in lines if line.startswith("APPTAINERENV_")}
    wanted = {"FT_RUN", "FT_STAGE", "FT_LIFE", "FT_PASS", "FT_IMAGE", "SLURM_JOB_ID", "HF_TOKEN"}
    assert passed == wanted | {"OMP_NUM_THREADS", "NCCL_DEBUG"}
    command = [line for line in lines if not line.startswith("APPTAINERENV_")]
    assert command[-3:] == [str(tmp_path / "i.sif"), "python", "-u"] and "--nv" in command
    assert "geheim" not in "\n".join(command)
    assert command.count("--mount") == 2  # the run, and /usr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"apptainer": "apptainer-1.9"}, "there is no apptainer-1.9 here"),
        ({"image": "/nowhere/i.sif"}, "the image /nowhere/i.sif does not exist here"),
        ({"SHIM_LOCK": "9999"}, "holds the packages of lock 9999, this run wants 0123"),
        ({"folder": "/blue/lab"}, "/blue/lab, which the image must show, does not exist here"),
    ],
)
def test_what_only_the_node_can_see_ends_the_life_in_words_and_waits(
    task: Run, change: dict[str, str], words: str
) -> None:
    folder = change.pop("folder", "/usr")
    process = task(folder, "--", "python", **change)
    assert process.wait(20) == 64
    code, _, said = outcome(task).partition(" ")
    assert code == "64" and words in said and "make resume RUN=" in said
    # A second rank that fails later does not overwrite it.
    assert task(folder, "--", "python", apptainer="other").wait(20) == 64
    assert words in outcome(task)


def refusal(*words: str) -> str:
    done = jobs(*words, "--cluster", "local-slurm")
    assert done.returncode == 64 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


def test_what_the_login_node_can_see_is_said_at_once_before_anything_is_queued(tmp_path: Path) -> None:
    wrong = {"command": "/no/apptainer", "image": "/no/i.sif", "binds": "[/no/blue,/usr]"}
    said = refusal("submit", "--set", " ".join(f"cluster.container.{key}={value}" for key, value in wrong.items()))
    for words in ("container.command: there is no '/no/apptainer'", "/no/i.sif does not exist", "/no/blue does not"):
        assert words in said
    assert "Did you mean command?" in refusal("image", "--set", "cluster.container.comand=x")
    assert "container is not set" in refusal("image", "--set", "cluster.container=null")


def test_a_full_cache_is_found_before_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = site("a100", container={}, cache=str(tmp_path))
    made = container.image(profile, CHECKOUT)
    assert made is not None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"no space left for the image"):
        images.build(profile, CHECKOUT, made)
    assert not Path(made["path"]).exists()


def test_a_build_that_ends_half_way_leaves_no_image_and_goes_on_from_what_it_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shim = tmp_path / "apptainer"
    shim.write_text(
        '#!/bin/bash\nfor target; do case $target in *.sif-*) break; esac; done\n'
        'echo half >"$target"; echo "image: torch"\n'
        '[ -e again ] || { echo "FATAL:   While performing build: out of luck" >&2; exit 255; }\n'
    )
    shim.chmod(0o755)
    shutil.copytree(CHECKOUT / "env", tmp_path / "env")
    section = {"command": str(shim), "images": str(tmp_path / "a b"), "base": str(tmp_path)}
    profile = site("a100", container=section)
    made = container.image(profile, tmp_path)
    assert made is not None
    target, fetched = Path(made["path"]), []

    def fetch(_: Path, wheels: Path) -> None:
        fetched.append(wheels.exists())
        wheels.mkdir(exist_ok=True)

    monkeypatch.setattr(images, "_fetch", fetch)
    with pytest.raises(FtError, match=r"out of luck.*What was fetched stays"):
        images.build(profile, tmp_path, made)
    assert [path.name for path in target.parent.iterdir() if path.suffix == ".sif"] == []
    (tmp_path / "env" / "again").touch()
    images.build(profile, tmp_path, made)
    assert fetched == [False, True] and target.read_text() == "half\n"
    assert (target.parent / f"{target.name}.sha256").read_text().endswith(f"  {target.name}\n")
    assert not list(target.parent.glob("wheels-*")) and "image: torch" in capsys.readouterr().out
    with (tmp_path / "env" / "train.def").open("a") as file:
        file.write("# newer\n")
    with pytest.raises(InputError, match="has changed since"):
        images.build(profile, tmp_path, made)


def test_an_image_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    shim = tmp_path / "apptainer"
    wanted = container.lock(CHECKOUT / "env")
    shim.write_text(f"#!/bin/sh\n[ $1 = inspect ] && echo 'org.ftlib.lock: {wanted}'\n")
    shim.chmod(0o755)
    (tmp_path / "i.sif").touch()
    section = f"cluster.container.command={shim} cluster.container.image={tmp_path}/i.sif"
    done = jobs("image", "--cluster", "local-slurm", "--set", section)
    assert (done.returncode, done.stdout) == (0, f"The image of these locks is there: {tmp_path}/i.sif\n")
    shim.write_text("#!/bin/sh\n[ $1 = inspect ] && echo 'org.ftlib.lock: 9999'\n")
    assert f"lock 9999, this checkout wants {wanted}" in refusal("image", "--set", section)


def test_a_missing_image_is_built_once_in_front_of_all_that_wait_for_it(tmp_path: Path) -> None:
    login = Login(copied_checkout(tmp_path), tmp_path)
    (login.checkout / "jobs" / "sweeps" / "two.yaml").write_text("grid: {train.seed: [1, 2]}")
    settings = "cluster.container.command=/bin/true cluster.container.build=job tracking.mode=disabled"
    for words in (["submit"], ["submit", "--new"], ["sweep", "--sweep", "two"]):
        done = login.jobs(*words, "--cluster", "local-slurm", "--set", settings)
        assert done.returncode == 0, done.stdout + done.stderr
    queued = login.queue.arrays
    (build,) = [number for number, job in queued.items() if job["comment"].startswith("ftlib image ")]
    prepare = [job for job in queued.values() if job["comment"].split(" ")[2] == "prepare"]
    assert len(prepare) == 3 and all(f"afterok:{build}" in job["dependency"] for job in prepare)
    assert all("slurm_templates/container.sh /bin/true " in job["script"] for job in prepare)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real image of some 3 MB."""
    assert APPTAINER is not None
    tried = subprocess.run([APPTAINER, "version"], capture_output=True, text=True, timeout=60)
    if tried.returncode:  # the one of env/local_apptainer.sh starts for root alone
        pytest.skip(f"{APPTAINER} does not start for this user: {tried.stderr.strip()}")
    root = tmp_path_factory.mktemp("small") / "root"
    for name in ("dev", "proc", "sys", "tmp", "etc", "mnt", "root", "bin"):
        (root / name).mkdir(parents=True)
    for name in ("hosts", "resolv.conf", "passwd", "group"):
        (root / "etc" / name).touch()
    for program in ("sh", "env", "sleep", "ls"):
        path = shutil.which(program)
        assert path is not None
        shutil.copy(path, root / "bin" / program)
        libraries = subprocess.run(["ldd", path], capture_output=True, text=True, timeout=60).stdout
        for library in re.findall(r"(/\S+)", libraries):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    (root.parent / "small.def").write_text(SMALL)
    target = root.parent / "i.sif"
    words = ["--build-arg", "BOOTSTRAP=localimage", "--build-arg", f"FROM={root}", str(target), "small.def"]
    done = subprocess.run([APPTAINER, "build", *words], cwd=root.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "tested" in done.stdout + done.stderr, done.stdout + done.stderr
    return str(target)


@real
def test_in_a_real_image_values_and_folders_arrive_as_they_are(task: Run, small: str, tmp_path: Path) -> None:
    assert APPTAINER is not None
    hard = Path("/opt") / f"ftlib-test-{os.getpid()} a,b:c\"d'"  # what Apptainer would show by itself is /tmp and home
    hard.mkdir()
    (hard / "seen").touch()
    try:
        value = "a b,c\"'$HOME `id` $(id) \\n"
        script = 'printf "%s\\n" "$NCCL_DEBUG"; echo "$SLURM_JOB_ID ${FOREIGN-none} $FT_IMAGE"; ls "$1"; pwd'
        words = [str(hard), "--", "sh", "-c", script, "sh", str(hard)]
        env = {"NCCL_DEBUG": value, "FOREIGN": "leaks"}
        said, _ = task(*words, apptainer=APPTAINER, image=small, **env).communicate(timeout=60)
    finally:
        shutil.rmtree(hard)
    run = task.run  # type: ignore[attr-defined]
    assert said.splitlines() == [value, "7 none i.sif sha256:", "seen", str(run / "code")], said


@real
def test_a_signal_to_all_leaves_the_worker_its_image_and_its_exit_code_comes_back(task: Run, small: str) -> None:
    assert APPTAINER is not None
    # `ls` must be read from the image after the signal, which every process of the task gets.
    script = "trap 'ls / >/dev/null && echo heard; exit 75' USR2; echo ready; i=0; while [ $i -lt 99 ]; do i=$((i+1)); "
    script += "sleep 0.1 || true; done"
    process = task("--", "sh", "-c", script, apptainer=APPTAINER, image=small)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGUSR2)
    assert process.communicate(timeout=20)[0].endswith("heard\n") and process.returncode == 75


@real
def test_where_no_user_namespace_is_left_the_log_tells_the_cause(task: Run, small: str, tmp_path: Path) -> None:
    assert APPTAINER is not None
    inner = "unshare --user --map-user=1000 --map-group=1000 --"
    text = Path(APPTAINER).read_text(errors="replace")
    if inner not in text:
        pytest.skip("only the wrapper of env/local_apptainer.sh can be given a namespace that allows no other")
    limited = tmp_path / "limited"
    one = "echo 1 >/proc/sys/user/max_user_namespaces"
    limit = f'unshare --user --map-root-user sh -c "{one}; exec {inner} \\"\\$@\\"" sh'
    limited.write_text(text.replace(inner, limit))
    limited.chmod(0o755)
    said, _ = task("--", "sh", "-c", "true", apptainer=str(limited), image=small).communicate(timeout=30)
    found = from_log(said)
    assert found is not None and found.cause == "container" and "user namespace" in found.line, said
