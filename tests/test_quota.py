"""A group's quota on shared storage: lfs quota's tables as they are printed, and what is refused by them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftlib.errors import InputError
from jobs import environment, quota, submit
from jobs import wish as wishes
from tests.wishes import jobs, site

HEAD = """Disk quotas for grp lab (gid 4242):
     Filesystem    used   quota   limit   grace   files   quota   limit   grace
"""
TABLES = {
    # -h: units; no soft limit; no limit on files
    "human": (f"{HEAD}          /blue  1.95T     0k      2T       -  123456       0       0       -\n", 0.975, 51.2),
    "plain": (f"{HEAD}          /blue  1048576  0  2097152  -  10  0  0  -\n", 0.5, 1.0),
    "soft limit passed": (f"{HEAD}          /blue  2.1T*     2T      3T    6d  123       0       0       -\n", 1.05, 0),
    "a name of its own line": (
        f"{HEAD}/a/very/long/name/of/a/file/system\n      1G     0k     10G       -      10       0       0       -\n",
        0.1,
        9.0,
    ),
    "a part of the answer": (
        f"{HEAD}          /blue  [1G]     0k      10G       -      10       0       0       -\n"
        "Some errors happened when getting quota info. Some devices may be not working or deactivated. "
        'The data in "[]" is inaccurate.\n',
        0.1,
        9.0,
    ),
    "files": (f"{HEAD}          /blue  1G     0k      10G       -  999       0       1000       -\n", 0.999, 9.0),
}


@pytest.mark.parametrize(("text", "share", "left_gib"), TABLES.values(), ids=TABLES)
def test_lfs_quotas_table(text: str, share: float, left_gib: float) -> None:
    found = quota.parse("lfs quota", text)
    assert found and found.left_bytes is not None
    assert found.share == pytest.approx(share, abs=1e-3)
    assert found.left_bytes / 2**30 == pytest.approx(left_gib, abs=0.1)


@pytest.mark.parametrize("text", ["", "lfs quota: cannot resolve path /blue", HEAD, "1 2 3 4 words"])
def test_an_answer_without_figures_tells_nothing(text: str) -> None:
    found = quota.parse("lfs quota", text)
    assert found is None or found.share < 1


def test_without_limits_nothing_is_full() -> None:
    found = quota.parse("lfs quota", f"{HEAD} /blue  5T  0k  0k  -  9  0  0  -\n")
    assert found and found.share == 0 and found.left_bytes is None


@pytest.fixture
def lfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose file `table` is what lfs quota answers for the group lab."""
    (tmp_path / "lfs").write_text(
        f'#!/bin/sh\n[ "$*" = "quota -hg lab /blue" ] || exit 2\ncat "{tmp_path}/table"\n'
    )
    (tmp_path / "lfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


COMMAND = {"storage.quota_command": "lfs quota -hg {account} /blue", "account": "lab"}


def test_a_full_group_is_refused_and_a_nearly_full_one_told(lfs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lfs / "table").write_text(TABLES["human"][0])
    with pytest.raises(InputError, match=r"storage is 98% full: 1,997 of 2,048 GiB .* 'lfs quota -hg lab /blue'"):
        environment.require(site("local", **COMMAND), Path("/blue"))
    (lfs / "table").write_text(TABLES["human"][0].replace("1.95T", "1.9T"))
    environment.require(site("local", **COMMAND), Path("/blue"))
    assert "warning: your group's storage is 95% full" in capsys.readouterr().err


def test_a_run_that_the_groups_quota_does_not_hold_is_refused_with_the_way_out(lfs: Path) -> None:
    (lfs / "table").write_text(TABLES["human"][0].replace("1.95T", "1.99T"))
    wish = wishes.make(model="llama2-7b", data=None, cluster="hipergator", settings="cluster.account=lab")
    assert wish.profile.storage.quota_command == COMMAND["storage.quota_command"]
    submit.require_space(2**30, "a run", new=[wish])
    with pytest.raises(InputError, match=r"quota for a run: 13\.0 GiB needed, 10\.2 GiB left .*export\.merged=false"):
        submit.require_space(13 * 2**30, "a run", new=[wish])


def test_a_site_without_the_command_is_not_held_up(tmp_path: Path) -> None:
    profile = site("local", **{**COMMAND, "storage.quota_command": "nosuchcommand -g {account}"})
    assert quota.ask(profile) is None and quota.problems(profile) == []


def test_a_placeholder_that_is_none_is_named() -> None:
    wrong = jobs("plan", "--cluster", "local", "--set", "cluster.storage.quota_command='lfs quota {group}'")
    assert wrong.returncode == 64 and "storage.quota_command: placeholder" in wrong.stderr
