"""A site's profile, a person's choices over it, and which cluster is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib import profile, recipe
from ftlib.errors import InputError
from tests.wishes import CLUSTERS, site


@pytest.mark.parametrize("name", recipe.names(CLUSTERS))
def test_every_profile_is_valid(name: str) -> None:
    assert site(name).name == name


def test_own_file_lies_over_the_profile_and_set_over_both(tmp_path: Path) -> None:
    own = tmp_path / "cluster.yaml"
    own.write_text("name: hipergator\naccount: mine\nqos: mine-b\n")
    found = profile.load(CLUSTERS, "hipergator", {"qos": "said"}, own)
    assert (found.account, found.resolved_qos(gpu=True)) == ("mine", "said")
    assert profile.own_choice(own) == "hipergator"
    assert profile.load(CLUSTERS, "a100", {}, own).account is None


def test_the_account_fills_qos_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    found = site("hipergator", account="lab")
    assert found.resolved_qos(gpu=True) == "lab"
    assert found.cache_dir(Path("/x")) == Path("/blue/lab/ada/.cache/ftlib")
    assert found.work_dir() == "/blue/lab/ada"
    assert found.missing_account() is None


def test_a_missing_account_is_named_with_the_mend() -> None:
    missing = site("hipergator").missing_account()
    assert missing and "cluster.account=" in missing and "cluster.yaml" in missing


def test_wrong_profiles_are_told_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        site("a100", gpu_partition="gpuu", qos="{acount}")
    text = "\n".join(caught.value.messages)
    assert "Did you mean gpu?" in text and "Did you mean account?" in text
    with pytest.raises(InputError, match=r"Allowed: name, gpu, .*Did you mean constraint"):
        profile.load(CLUSTERS, "a100", {"partitions": [{"name": "gpu", "constrain": "x"}]})
    with pytest.raises(InputError, match="Did you mean hipergator"):
        site("hipergater")
