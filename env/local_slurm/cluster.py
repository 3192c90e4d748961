#!/usr/bin/env python3
"""A real Slurm on this one machine: three nodes, two fake A100 each, accounting, a QOS that preempts.

    cluster.py up       install what is missing, start, wait until a job has run; does nothing where it is healthy.
                        --no-accounting: as on small clusters, without slurmdbd, accounts, QOS and preemption
    cluster.py down     stop everything, jobs too; --purge removes the folder (else its logs stay to be read)
    cluster.py status   daemons, nodes, queue; exit code 0 if healthy, else 1

All state lies in one folder, /tmp/ftlib-slurm or $FTLIB_SLURM_DIR, and every `up` that starts daemons begins afresh.
`SLURM_CONF=/tmp/ftlib-slurm/slurm.conf sbatch ...` is all that a shell needs. Nothing touches a system-wide munge,
MariaDB or Slurm. The templates beside this file say what the cluster looks like.

Exit codes: 0 fine, 1 unhealthy or failed to start, 64 unusable folder, 69 packages missing, 77 not root.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemons import alive, daemons, start, stop_all, wait_for
from layout import (
    CONF,
    DIR,
    ENV,
    NODES,
    TEMPLATES,
    fail,
    has_accounting,
    require_root,
    require_usable_dir,
    run,
    succeeds,
    write_folder,
)

PACKAGE_OF = {
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}


OF_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")


# ---- packages


def missing_packages(*, accounting: bool) -> list[str]:
    needed = {name: package for name, package in PACKAGE_OF.items() if accounting or name not in OF_ACCOUNTING}
    return sorted({package for name, package in needed.items() if not shutil.which(name, path=ENV["PATH"])})


def install_packages(*, accounting: bool) -> None:
    wanted = missing_packages(accounting=accounting)
    if not wanted:
        return
    if not shutil.which("apt-get"):
        fail(69, f"packages missing: {' '.join(wanted)} (Debian's names; there is no apt-get here to install them)")
    print(f"cluster: installing {' '.join(wanted)}", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # A source that cannot be refreshed need not matter: the install decides.
    subprocess.run(["apt-get", "-qq", "update"], env=env, stdout=sys.stderr)
    subprocess.run(["apt-get", "-qq", "install", "--no-install-recommends", "-y", *wanted], env=env, stdout=sys.stderr)
    if still := missing_packages(accounting=accounting):
        fail(69, f"packages missing: {' '.join(still)} (apt-get could not install them; its words are above)")


# ---- accounts and nodes


def make_accounts() -> None:
    lines = (TEMPLATES / "accounts.txt").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    users = dict.fromkeys(["root", os.environ.get("SUDO_USER") or "root"])
    commands += [f"add user {user} Account=lab DefaultAccount=lab" for user in users]
    commands += [f"modify user {user} set DefaultAccount=lab" for user in users]
    for command in commands:
        run("sacctmgr", "-i", "-Q", *command.split())


def node_wrapper(node: str) -> tuple[str, ...]:
    """As on a real site, a job sees its node's name as hostname, and the nodes' names resolve.

    That needs namespaces of its own for each slurmd; without the right to make them, jobs see this machine's name.
    """
    script = 'echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
    unshare = ("unshare", "--mount", "--uts", "--propagation", "slave", "sh", "-c", script, "sh", node, f"{DIR}/hosts")
    return unshare if succeeds(*unshare, "true") else ()


# ---- health


def node_states() -> dict[str, str]:
    """Node name to state, such as idle, mixed, or down* (the star: it does not answer)."""
    try:
        lines = run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T", timeout_s=20).splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: state for name, state in (line.split() for line in lines if line)}


def ailments() -> list[str]:
    """What is wrong with the cluster; empty where it is healthy."""
    if dead := [daemon for daemon in daemons() if not alive(daemon)]:
        return [f"{daemon} is not running" for daemon in dead]
    states = node_states()
    good = ("idle", "mixed", "allocated", "completing", "planned", "reserved")
    bad = [f"node {node} is {states.get(node, 'unknown')}" for node in NODES if states.get(node) not in good]
    if has_accounting() and not succeeds("sacctmgr", "-n", "-P", "show", "qos", "format=name"):
        bad.append("accounting does not answer")
    return bad


def probe_job() -> bool:
    """A job on all nodes ran, and accounting, where there is one, knows it."""
    try:
        command = ("srun", "-N3", "-n3", "-t1", "sh", "-c", "echo $SLURM_JOB_ID")
        job_id = run(*command, timeout_s=30).split()[0]
    except (subprocess.SubprocessError, IndexError):
        return False
    if not has_accounting():
        return True
    for _ in range(50):
        if run("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "state").strip() == "COMPLETED":
            return True
        time.sleep(0.2)
    return False


# ---- commands


def start_all(*, accounting: bool) -> None:
    write_folder(accounting=accounting)
    files = [f"--{name}={DIR}/{path}" for name, path in (
        ("socket", "run/munge.socket"), ("pid-file", "run/munged.pid"), ("log-file", "log/munged.log"),
        ("key-file", "key/munge.key"), ("seed-file", "key/munge.seed"))]  # fmt: skip
    munged = start("munged", "munged", "--foreground", *files)
    wait_for("munge", (DIR / "run/munge.socket").exists, munged=munged)
    if accounting:
        start_accounting()
    slurmctld = start("slurmctld", "slurmctld", "-D")
    nodes = {
        f"slurmd_{node}": start(f"slurmd-{node}", "slurmd", "-D", "-N", node, wrapper=node_wrapper(node))
        for node in NODES
    }
    wait_for("nodes", lambda: list(node_states().values()) == ["idle"] * len(NODES), slurmctld=slurmctld, **nodes)
    wait_for("first job", probe_job, slurmctld=slurmctld, **nodes)


def start_accounting() -> None:
    mariadb = ("--no-defaults", f"--datadir={DIR}/mariadb", "--user=root")
    # Over the socket, the database's root is this machine's root, without a password.
    install = ("mariadb-install-db", *mariadb, "--skip-test-db", "--auth-root-authentication-method=socket")
    (DIR / "log/mariadb-install-db.out").write_text(run(*install))
    database = start(
        "mariadbd", "mariadbd", *mariadb, "--skip-networking", f"--socket={DIR}/run/mariadb.sock",
        f"--pid-file={DIR}/run/mariadbd.pid", f"--log-error={DIR}/log/mariadbd.log",
        "--innodb-flush-log-at-trx-commit=0", "--innodb-log-file-size=16M",
    )  # fmt: skip
    wait_for("database", (DIR / "run/mariadb.sock").exists, mariadbd=database)
    # Its configuration has no option of its own: slurmdbd.conf lies beside the slurm.conf that SLURM_CONF names.
    slurmdbd = start("slurmdbd", "slurmdbd", "-D")
    wait_for("accounting", lambda: succeeds("sacctmgr", "-n", "show", "cluster"), slurmdbd=slurmdbd)
    make_accounts()


@contextmanager
def alone() -> Iterator[None]:
    """One `up` or `down` at a time: a second one waits. The lock lies beside the folder, which `up` deletes."""
    DIR.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{DIR}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(*, accounting: bool) -> int:
    require_root()
    require_usable_dir()
    with alone():
        install_packages(accounting=accounting)
        hint = f"  export SLURM_CONF={CONF}"
        bad = ailments()
        if not bad and has_accounting() != accounting:
            bad = ["it is wanted with accounting" if accounting else "it is wanted without accounting"]
        if not bad:
            print(f"cluster: already up\n{hint}")
            return 0
        if CONF.exists() and any(alive(daemon) for daemon in daemons()):
            print(f"cluster: starting anew ({'; '.join(bad)})", flush=True)
        began = time.monotonic()
        stop_all()
        start_all(accounting=accounting)
        accounts = "account lab, QOS group (default) and group-b" if accounting else "no accounting"
        print(f"cluster: up in {time.monotonic() - began:.0f} s: nodes {' '.join(NODES)}, {accounts}\n{hint}")
    return 0


def down(purge: bool) -> int:
    require_root()
    require_usable_dir()
    with alone():
        stop_all()
        if purge:
            shutil.rmtree(DIR, ignore_errors=True)
            Path(f"{DIR}.lock").unlink()
    print("cluster: down" if purge or not DIR.exists() else f"cluster: down (logs in {DIR}/log)")
    return 0


def status() -> int:
    if not CONF.exists():
        print(f"cluster: not up (no {CONF})")
        return 1
    print("daemons: " + ", ".join(f"{daemon} {'runs' if alive(daemon) else 'DEAD'}" for daemon in daemons()))
    bad = ailments()
    if alive("slurmctld"):
        for command in (("sinfo", "-N", "-o", "%N %P %T %C %m %G"), ("squeue", "-o", "%i %j %u %q %T %M %R")):
            try:
                print(run(*command, timeout_s=20).rstrip())
            except subprocess.SubprocessError as error:
                print(f"{command[0]} does not answer: {error}")
    print("healthy" if not bad else "unhealthy: " + "; ".join(bad))
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser("up", help="start the cluster, or say that it is up")
    up_parser.add_argument("--no-accounting", action="store_true", help="as on small clusters: no slurmdbd, no QOS")
    down_parser = commands.add_parser("down", help="stop the cluster and its jobs")
    down_parser.add_argument("--purge", action="store_true", help="remove its folder too")
    commands.add_parser("status", help="print daemons, nodes and queue")
    options = parser.parse_args()
    try:
        if options.command == "up":
            return up(accounting=not options.no_accounting)
        return down(options.purge) if options.command == "down" else status()
    except subprocess.CalledProcessError as error:
        fail(1, f"{' '.join(error.cmd)} exited {error.returncode}: {error.stderr.strip() or error.stdout.strip()}")
    except (OSError, subprocess.SubprocessError) as error:
        fail(1, str(error))


if __name__ == "__main__":
    sys.exit(main())
