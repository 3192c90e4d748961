"""A profile held against the cluster itself: account, QOS, partitions, GPU names. Two questions to Slurm."""

from __future__ import annotations

import getpass
import re
from collections import defaultdict

from ftlib.errors import Unavailable, nearest
from ftlib.profile import ClusterProfile
from ftlib.slurm import client


def problems(profile: ClusterProfile) -> list[str]:
    """A line for each name of the profile that this cluster does not know, with those it knows."""
    client.use(profile.scheduler.slurm_conf if profile.scheduler else None)
    return _account(profile) + _partitions(profile)


def _account(profile: ClusterProfile) -> list[str]:
    """What accounting allows this person; nothing where it does not tell."""
    asked = ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos")
    try:
        rows = [line.split("|") for line in client.call(*asked).splitlines()]
    except Unavailable:
        return []
    allowed: dict[str, set[str]] = defaultdict(set)
    for account, qos in (row for row in rows if len(row) == 2):
        allowed[account] |= set(filter(None, qos.split(",")))
    if not allowed or profile.account is None:
        return []
    if profile.account not in allowed:
        return [_unknown("account", profile.account, allowed)]
    known = allowed[profile.account]
    wanted = {profile.resolved_qos(gpu=True), profile.resolved_qos(gpu=False)} - {None}
    return [_unknown("qos", str(qos), known) for qos in sorted(map(str, wanted - known))] if known else []


def _partitions(profile: ClusterProfile) -> list[str]:
    gres: dict[str, set[str]] = defaultdict(set)
    for line in client.call("sinfo", "-h", "-o", "%R|%G").splitlines():
        name, _, offered = line.partition("|")
        # gpu:a100:2(S:0-1) or gpu:2
        gres[name] |= set(re.findall(r"gpu:([A-Za-z_][\w.-]*):\d", offered))
    found = []
    for field, name in (("gpu_partition", profile.gpu_partition), ("cpu_partition", profile.cpu_partition)):
        if name not in gres:
            found.append(_unknown(field, name, gres))
    gpu = profile.partition(gpu=True).gpu
    known = gres.get(profile.gpu_partition)
    if gpu and gpu.gres and known is not None and gpu.gres not in known:
        found.append(_unknown(f"GPU name in {profile.gpu_partition}", gpu.gres, known))
    return found


def _unknown(what: str, name: str, known: object) -> str:
    names = sorted(known)  # type: ignore[call-overload]
    return (
        f"{what}: Slurm does not know {name!r} for you here. It knows: {', '.join(names) or '(none)'}."
        f"{nearest(name, names)} Put the right one into cluster.yaml"
    )
