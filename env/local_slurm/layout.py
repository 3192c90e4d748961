"""Where the cluster's state lies, the environment its programs get, and its configuration files."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from string import Template
from typing import NoReturn

TEMPLATES = Path(__file__).resolve().parent / "templates"
DIR = Path(os.environ.get("FTLIB_SLURM_DIR") or "/tmp/ftlib-slurm")
CONF = DIR / "slurm.conf"
NODES = ("n1", "n2", "n3")
# Its own environment: one taken from inside a job would point the daemons and the probes at that job.
ENV = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin",
    "LANG": "C.UTF-8",
    "SLURM_CONF": str(CONF),
    "MYSQL_UNIX_PORT": str(DIR / "run/mariadb.sock"),
}


def fail(code: int, message: str) -> NoReturn:
    print(f"cluster: {message}", file=sys.stderr)
    sys.exit(code)


def require_root() -> None:
    if os.geteuid() != 0:
        fail(77, "this must run as root: slurmd starts jobs for others, and the fake GPUs are device nodes (try sudo)")


def require_usable_dir() -> None:
    """The folder is deleted by `up`, so it must be ours; and Slurm's configuration cannot quote a path."""
    text = str(DIR)
    if not DIR.is_absolute() or any(c in text for c in " \t\n,=#$%[]'\"\\") or len(text) > 80:
        fail(64, f"FTLIB_SLURM_DIR={text!r}: want an absolute path of at most 80 plain characters, without spaces")
    foreign = DIR.exists() and not (DIR / ".ftlib-slurm").exists() and (not DIR.is_dir() or any(DIR.iterdir()))
    if foreign or DIR.is_symlink():
        fail(64, f"{DIR} exists and was not made by this script: move it away, or set FTLIB_SLURM_DIR")


def run(*command: str, timeout_s: float = 60) -> str:
    """Standard output of a command; CalledProcessError or TimeoutExpired where it fails."""
    return subprocess.run(
        command, env=ENV, check=True, timeout=timeout_s, text=True, stdin=subprocess.DEVNULL, capture_output=True
    ).stdout


def succeeds(*command: str) -> bool:
    try:
        run(*command)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def free_ports() -> int:
    """The first of five free neighbouring ports: two clusters, or a real Slurm beside this one, do not collide."""
    for first in range(16810, 17800, 10):
        try:
            for port in range(first, first + 5):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    fail(1, "no five free ports between 16810 and 17800")


NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
# What is left out of slurm.conf with it: all of accounting, and what needs a QOS.
NEEDS_ACCOUNTING = ("Accounting", "PreemptType=", "PreemptMode=")


def has_accounting() -> bool:
    """Whether this cluster was started with accounting; as it would be, where there is none yet."""
    return not CONF.exists() or NO_ACCOUNTING not in CONF.read_text()


def write_folder(*, accounting: bool) -> None:
    if DIR.exists():
        shutil.rmtree(DIR)
    DIR.mkdir(parents=True)
    DIR.chmod(0o755)
    (DIR / ".ftlib-slurm").touch()
    for name in ("run", "log", "state", "spool", "dev", "key", *(f"spool/{node}" for node in NODES)):
        (DIR / name).mkdir()
    (DIR / "key").chmod(0o700)
    (DIR / "key/munge.key").write_bytes(os.urandom(128))
    (DIR / "key/munge.key").chmod(0o600)
    for index in (0, 1):
        try:
            os.mknod(DIR / f"dev/a100-{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            fail(77, "this root may not make device nodes (mknod), which the fake GPUs need: give it CAP_MKNOD")
    port = free_ports()
    values = {
        "DIR": str(DIR),
        "HOST": socket.gethostname().partition(".")[0],
        "CTLD_PORT": str(port),
        "DBD_PORT": str(port + 1),
        "NODE_PORTS": f"{port + 2}-{port + 4}",
        "FIRST_JOB_ID": str(int(time.time()) % 60_000_000 + 1),  # Slurm's highest is 67,043,328
    }
    # Slurm learned to do without cgroups in 23.11; older ones do not know the word, and need no such file.
    year, month = run("slurmd", "-V").split()[-1].split(".")[:2]
    cgroup = ("cgroup.conf",) if (int(year), int(month)) >= (23, 11) else ()
    for name in ("slurm.conf", "gres.conf", "slurmdbd.conf", "hosts", *cgroup):
        target = DIR / name
        text = Template((TEMPLATES / name).read_text()).substitute(values)
        if name == "slurm.conf" and not accounting:
            kept = [line for line in text.splitlines() if not line.startswith((*NEEDS_ACCOUNTING, "MinJobAge="))]
            # What the controller forgets nobody knows then: soon, so that tests see it.
            text = "\n".join([*kept, NO_ACCOUNTING, "MinJobAge=10", ""])
        target.write_text(text)
        target.chmod(0o600 if name == "slurmdbd.conf" else 0o644)
