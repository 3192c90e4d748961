"""Fetching a model from a Hub on this machine, with the real huggingface_hub: resumed, shared, refused in words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlib import atomic, download, hubapi, hubget, modelfiles
from ftlib.errors import FtError, InputError, Interrupted
from ftlib.lease import Lease
from ftlib.rundir import RunDir
from ftlib.runs.diagnosis import Evidence, cause_of
from ftlib.runs.events import Progress
from ftlib.stop import StopFlag
from tests.hub_server import TOKEN, Hub, serving
from tests.processes import started
from tests.tiny_llama import write_run
from tests.wishes import CHECKOUT, copied_checkout, jobs

pytest.importorskip("huggingface_hub", reason="the training packages are not installed (make setup)")

NAME = "acme/base"
BIG = os.urandom(24 * 2**20)
SMALL = {
    "config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "tokenizer_config.json": b"{}",
    "README.md": b"text", "original/consolidated.00.pth": b"the same again",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one model; nobody is logged in."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving() as hub:
        hub.add(NAME, {**SMALL, "model.safetensors": BIG, "pytorch_model.bin": b"the same weights"})
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(download, "RETRY_WAITS_S", (0.1, 0.1))
        yield hub


def fetch(cache: Path, revision: str | None = None, stop: StopFlag | None = None) -> download.Fetched:
    return download.fetch_model(NAME, revision, cache=cache, owner="a test", stop=StopFlag() if stop is None else stop)


def big_requests(hub: Hub) -> list[str]:
    """The Range of each request for the large file."""
    return [ranges for method, path, ranges in hub.requests if method == "GET" and path.count("/") == 1]


def test_only_what_a_run_needs_comes_and_a_second_fetch_downloads_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []
    found = download.fetch_model(
        NAME, None, cache=tmp_path, owner="a test", stop=StopFlag(), committed=pieces.append)
    assert found.commit == "a" * 40
    folder = modelfiles.snapshot(tmp_path, NAME, None)
    assert folder is not None and modelfiles.missing(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == BIG
    assert pieces and "4 of 4 files" in pieces[-1]
    said = capsys.readouterr().out
    assert "0.03 of 0.03 GB, 4 of 4 files" in said and "MB/s" in said
    before = len(big_requests(hub))
    assert fetch(tmp_path) == download.Fetched("a" * 40, 0) and len(big_requests(hub)) == before
    assert not list(modelfiles.repository(tmp_path, NAME).glob("ftlib-lease-*"))


def test_a_download_that_is_killed_in_a_file_goes_on_in_that_file(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_s = 5e6
    code = (
        "import sys; from pathlib import Path; from ftlib import download; from ftlib.stop import StopFlag\n"
        f"download.fetch_model({NAME!r}, None, cache=Path(sys.argv[1]), owner='a test', stop=StopFlag())"
    )
    with started([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT) as first:
        partial = wait_for_partial(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    time.sleep(1.5)  # the killed process's own child ends within a second
    had = partial.stat().st_size
    assert 0 < had < len(BIG)
    hub.bytes_per_s = 1e9
    assert fetch(tmp_path).commit == "a" * 40
    folder = modelfiles.snapshot(tmp_path, NAME, None)
    assert folder is not None and (folder / "model.safetensors").read_bytes() == BIG
    resumed_at = int(big_requests(hub)[-1].removeprefix("bytes=").rstrip("-"))
    assert resumed_at >= had
    assert not partial.exists() and hub.leaked == []


def wait_for_partial(cache: Path, at_least: int = 2**20) -> Path:
    deadline = time.monotonic() + 30
    while True:
        for path in cache.glob("models--*/blobs/*" + hubget.PARTIAL):
            if path.stat().st_size >= at_least:
                return path
        assert time.monotonic() < deadline, "no part of the large file arrived"
        time.sleep(0.05)


def test_damage_in_what_had_arrived_is_found_and_downloaded_anew(hub: Hub, tmp_path: Path) -> None:
    import hashlib

    blobs = modelfiles.repository(tmp_path, NAME) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / (hashlib.sha256(BIG).hexdigest() + hubget.PARTIAL)).write_bytes(b"\0" * 2**20)
    fetch(tmp_path)
    folder = modelfiles.snapshot(tmp_path, NAME, None)
    assert folder is not None and (folder / "model.safetensors").read_bytes() == BIG


def test_the_stop_flag_is_obeyed_within_seconds_and_what_came_stays(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_s = 4e6
    stop = StopFlag()

    def set_flag() -> None:
        wait_for_partial(tmp_path)
        stop.cause, stop.at = "preemption", time.monotonic()

    threading.Thread(target=set_flag, daemon=True).start()
    with pytest.raises(Interrupted, match="preemption"):
        fetch(tmp_path, stop=stop)
    assert stop.at is not None and time.monotonic() - stop.at < 3
    assert wait_for_partial(tmp_path).stat().st_size > 0
    assert not list(modelfiles.repository(tmp_path, NAME).glob("ftlib-lease-*"))


def test_of_two_that_fetch_at_once_one_downloads(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.bytes_per_s = 12e6
    code = (
        "import sys; from pathlib import Path; from ftlib import download; from ftlib.stop import StopFlag\n"
        f"print(download.fetch_model({NAME!r}, None, cache=Path(sys.argv[1]), owner=sys.argv[2], stop=StopFlag()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with started([*command, "a"], cwd=CHECKOUT) as one, started([*command, "b"], cwd=CHECKOUT) as other:
        assert (one.wait(120), other.wait(120)) == (0, 0)
    assert big_requests(hub) == [""] and "is being downloaded by process" in capfd.readouterr().out


def test_a_branch_that_moves_is_another_commit_and_the_old_one_stays(hub: Hub, tmp_path: Path) -> None:
    assert fetch(tmp_path).commit == "a" * 40
    moved = {**SMALL, "config.json": b'{"model_type": "llama", "new": 1}', "model.safetensors": BIG}
    hub.add(NAME, moved, commit="b" * 40)
    assert fetch(tmp_path).commit == "b" * 40 and big_requests(hub) == [""]
    assert fetch(tmp_path, "a" * 40) == download.Fetched("a" * 40, 0)


def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "odd.safetensors"}}
    shards = {"model-00001-of-00002.safetensors": b"1", "odd.safetensors": b"2", "unused.safetensors": b"3"}
    hub.add(NAME, {**SMALL, "model.safetensors.index.json": json.dumps(index).encode(), **shards}, commit="c" * 40)
    fetch(tmp_path)
    folder = modelfiles.snapshot(tmp_path, NAME, None)
    assert folder is not None
    assert {path.name for path in folder.iterdir()} >= {"odd.safetensors", "model-00001-of-00002.safetensors"}
    assert not (folder / "unused.safetensors").exists()


def test_weights_that_are_not_there_are_named(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, SMALL, commit="d" * 40)
    with pytest.raises(InputError, match=r"has no model.safetensors or .*; expected a model as transformers saves it"):
        fetch(tmp_path)


def test_a_hub_that_is_down_is_no_matter_where_the_files_are_complete(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(tmp_path)
    hub.down = True
    assert fetch(tmp_path).commit == "a" * 40 and "are complete and are used" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "models--acme--base")
    with pytest.raises(FtError, match=r"Service Unavailable: .* answers 503") as raised:
        fetch(tmp_path)
    # Tried again by itself: it is not the user's mistake.
    assert raised.value.exit_code == 1
    assert cause_of(Evidence(outcome_code=1, outcome_message=str(raised.value))).cause == "transient"


def test_a_full_disk_is_seen_before_a_byte_comes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(InputError, match="no space left for the files of acme/base"):
        fetch(tmp_path)
    assert big_requests(hub) == []


class TestAccess:
    """What the Hub refuses, before anything is queued and in the job."""

    def test_a_gated_model_without_a_login(self, hub: Hub, tmp_path: Path) -> None:
        hub.repositories[f"models/{NAME}"].gated = True
        with pytest.raises(InputError, match=rf"gated and you are not logged in .*{hub.address}/{NAME}.*hf auth login"):
            fetch(tmp_path)

    def test_a_gated_model_that_the_account_may_not_read(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repositories[f"models/{NAME}"].gated = True
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(InputError, match="HF_TOKEN has no access yet") as raised:
            hubapi.look_up("model", NAME)
        assert raised.value.exit_code == 64 and "hf_other" not in str(raised.value)

    def test_the_token_of_a_login_opens_it_although_hf_home_moves(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.repositories[f"models/{NAME}"].gated = True
        (tmp_path / "login").mkdir()
        (tmp_path / "login" / "token").write_text(f"{TOKEN}\n")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "login" / "token"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
        assert fetch(tmp_path).commit == "a" * 40
        assert hub.leaked == []  # the file server is another host

    def test_an_unknown_revision_names_those_there_are(self, hub: Hub) -> None:
        with pytest.raises(InputError, match=r"model.revision: 'mian' is no branch.*one of main. Did you mean main\?"):
            hubapi.look_up("model", NAME, "mian")

    def test_an_unknown_name_and_a_gated_dataset(self, hub: Hub) -> None:
        with pytest.raises(InputError, match=r"model.name: there is no model 'acme/bsae' .*private"):
            hubapi.look_up("model", "acme/bsae")
        hub.add("acme/rows", {"a.jsonl": b"{}"}, kind="datasets").gated = True
        with pytest.raises(InputError, match=r"data.hub: acme/rows is gated .*/datasets/acme/rows"):
            hubapi.look_up("dataset", "acme/rows")


class TestLease:
    """One process of all nodes at a time, and one that died is taken over."""

    def test_it_is_held_by_one_and_free_again(self, tmp_path: Path) -> None:
        first, second = Lease(tmp_path, "run a"), Lease(tmp_path, "run b")
        assert first.acquire() is None
        assert "for run a" in str(second.acquire())
        first.release()
        assert second.acquire() is None
        second.release()
        assert list(tmp_path.iterdir()) == []

    def test_a_later_attempt_of_the_same_owner_takes_over_and_the_former_sees_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, later = Lease(tmp_path, "run a"), Lease(tmp_path, "run a")
        assert first.acquire() is None and first.keep()
        assert later.acquire() is None
        monkeypatch.setattr("ftlib.lease.BEAT_S", 0)
        assert later.keep() and not first.keep()

    def test_one_on_another_node_is_abandoned_when_it_stays_unchanged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "ftlib-lease-1").write_text("other-node\n17\nrun z\n1\n")
        mine = Lease(tmp_path, "run a")
        assert "process 17 on other-node, for run z" in str(mine.acquire())
        monkeypatch.setattr("ftlib.lease.ABANDONED_S", 0.05)
        time.sleep(0.1)
        (tmp_path / "ftlib-lease-1").write_text("other-node\n17\nrun z\n2\n")  # it is at work
        assert mine.acquire() is not None
        time.sleep(0.1)
        assert mine.acquire() is None


class TestARun:
    """From submit to the stages behind prepare."""

    @pytest.fixture
    def tiny(self, hub: Hub, tmp_path: Path) -> Path:
        """The Hub's acme/base is a real model of the checkout; the folder is a cache."""
        folder = CHECKOUT / "models" / "tiny-llama3"
        hub.add(NAME, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        return tmp_path / "home" / "hub"

    def run_of(self, folder: Path) -> RunDir:
        return write_run(folder, Path(NAME), data__pairs=20)

    def test_the_commit_that_prepare_finds_is_every_later_stages(
        self, hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from jobs import stage

        monkeypatch.setattr(modelfiles, "hub_cache", lambda: tiny)
        run = self.run_of(tmp_path / "run")
        assert run.spec().model.revision is None
        assert stage.fetch_model(run, 3, StopFlag()) == "a" * 40
        progress = run.ledger().of(Progress)
        assert progress and {(event.stage, event.attempt) for event in progress} == {("prepare", 3)}
        atomic.write_json(run.prepared_file, {"model_commit": "a" * 40})
        hub.add(NAME, {"config.json": b"{}"}, commit="b" * 40)
        assert run.spec().model.revision == "a" * 40 and run.requested().model.revision is None

    def test_a_later_job_loads_without_the_network_and_names_a_file_that_is_gone(
        self, hub: Hub, tiny: Path, tmp_path: Path
    ) -> None:
        download.fetch_model(NAME, None, cache=tiny, owner="a test", stop=StopFlag())
        code = (
            "import sys; from ftlib.data import tokenizing; from ftlib.errors import InputError\n"
            f"try: print(len(tokenizing.load({NAME!r}, 'a' * 40)))\n"
            "except InputError as error: sys.exit(str(error))"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tiny.parent)}

        def load() -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-c", code]
            return subprocess.run(words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)

        before = len(hub.requests)
        assert int(load().stdout) > 100 and len(hub.requests) == before
        (tiny / "models--acme--base" / "snapshots" / ("a" * 40) / "tokenizer.json").unlink()
        said = load().stderr
        assert "Looked for tokenizer.json or tokenizer.model in" in said and "HF_HUB_OFFLINE is set" in said
        assert f"make fetch MODEL=<recipe> SET=model.revision={'a' * 40}" in said

    def test_what_the_hub_refuses_is_refused_before_anything_is_made(
        self, hub: Hub, tiny: Path, tmp_path: Path
    ) -> None:
        checkout = copied_checkout(tmp_path)
        hub.repositories[f"models/{NAME}"].gated = True
        words = ["submit", "--cluster", "local", "--set", f"model.name={NAME} data.hub=acme/rows"]
        done = jobs(*words, checkout=checkout, HF_TOKEN="hf_other")
        assert done.returncode == 64 and "Traceback" not in done.stderr
        assert "model.name: acme/base is gated" in done.stderr
        done = jobs(*words, checkout=checkout, HF_TOKEN=TOKEN)
        assert done.returncode == 64 and "data.hub: there is no dataset 'acme/rows'" in done.stderr
        words[-1] = f"model.name={NAME} model.revision=v9"
        done = jobs(*words, checkout=checkout, HF_TOKEN=TOKEN)
        assert done.returncode == 64 and "'v9' is no branch, tag or commit" in done.stderr
        assert not (checkout / "runs").exists()

    def test_fetch_brings_model_and_dataset_to_where_jobs_without_a_network_look(
        self, hub: Hub, tiny: Path, tmp_path: Path
    ) -> None:
        checkout = copied_checkout(tmp_path)
        hub.add("acme/rows", {"a.jsonl": b'{"instruction": "a", "output": "b"}\n'}, kind="datasets")
        closed = "cluster.compute_internet=false"
        words = ["--cluster", "local-slurm", "--set", f"model.name={NAME} data.hub=acme/rows {closed}"]
        refused = jobs("plan", *words, checkout=checkout)
        assert refused.returncode == 64 and "make fetch" in refused.stderr
        done = jobs("fetch", *words, checkout=checkout)
        assert done.returncode == 0, done.stderr
        assert "acme/base at commit aaaaaaaaaaaa is at hand" in done.stdout
        asked = len(hub.requests)
        planned = jobs("plan", *words, checkout=checkout)
        assert planned.returncode == 0 and len(hub.requests) == asked, planned.stderr

    @pytest.mark.nightly
    def test_a_whole_run_of_a_gated_model_downloads_in_prepare_alone(
        self, hub: Hub, tiny: Path, tmp_path: Path
    ) -> None:
        checkout = copied_checkout(tmp_path)
        hub.repositories[f"models/{NAME}"].gated = True
        (tmp_path / "home" / "token").parent.mkdir(exist_ok=True)
        (tmp_path / "home" / "token").write_text(TOKEN)
        settings = (
            f"model.name={NAME} train.steps=4 data.pairs=200 evaluate.pairs=4 evaluate.max_new_tokens=4 "
            "method.train_layers=[0-1]"
        )
        done = jobs("submit", "--model", "tiny-llama3", "--cluster", "local", "--set", settings, checkout=checkout)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "the prepare job downloads" in done.stdout
        assert "model: acme/base at commit aaaaaaaaaaaa: downloaded" in done.stdout
        (run,) = map(RunDir, (checkout / "runs").glob("tiny-llama3-*"))
        assert run.prepared()["model_commit"] == "a" * 40 and run.evaluation_file.exists()
        assert {path for method, path, _ in hub.requests if "resolve/main" in path} == {
            f"/{NAME}/resolve/main/config.json"}  # submit's questions; the files came by their commit
