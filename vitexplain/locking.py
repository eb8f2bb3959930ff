"""One process a folder of results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError
from .files import make_folder, save_json


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder belongs to this process inside the `with`.

    The operating system holds the lock, so that one of a process that was killed is gone with it. A note beside it
    says whose it is.

    Raises:
        ExportError: another process holds it, or the file system has no locks.
    """
    from filelock import FileLock, Timeout

    make_folder(folder)
    lock, note = FileLock(folder / ".lock"), folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(
            f"the folder {str(folder)!r} is in use by another run{_owner(note)}; wait for it, end it, or choose "
            "another --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise ExportError(
            f"cannot lock the folder {str(folder)!r}: {type(error).__name__}: {error}. Choose one on a local disk"
        ) from error
    try:
        save_json({"pid": os.getpid(), "host": platform.node()}, note)
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _owner(note: Path) -> str:
    try:
        owner = json.loads(note.read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # it may be taking or leaving the folder right now
        return ""
