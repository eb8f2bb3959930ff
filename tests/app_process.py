"""The app in a process of its own, as the command starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(port: int) -> list[str]:
    """The command that starts the app at a port."""
    return [sys.executable, "-m", "vitexplain", "app", "--no-browser", "--port", str(port)]


def environment(**more: str) -> dict[str, str]:
    """The environment of the command: this tree is found, and one thread is enough."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **more}


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Runs the app with its temporary files in a folder; it is stopped as by Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = environment(TMPDIR=str(folder))
    with subprocess.Popen(command(port), stdout=subprocess.PIPE, env=started, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"Listening at http://127.0.0.1:{port}/"), line
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)
    assert process.returncode == 130
