"""Processes that run beside a test: each is ended when its test leaves, however that leaves, and can be interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# From SIGKILL to the end of a process, in seconds.
END_S = 30


def _default_interrupt() -> None:
    """A suite that was started in the background ignores SIGINT, and so would its children: Ctrl-C must end them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process; `options` are Popen's, with text on.

    `with subprocess.Popen(...)` would wait without end for a process that a failing test leaves behind. With
    `start_new_session` all processes of its group are ended.
    """
    process = subprocess.Popen(command, **{"text": True, "preexec_fn": _default_interrupt, **options})
    try:
        yield process
    finally:
        process.kill()
        if options.get("start_new_session"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait(timeout=END_S)
