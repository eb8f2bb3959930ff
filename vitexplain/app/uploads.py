"""Files that lie on the server for a while: whose they are, and their removal."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

_GRACE = 60.0  # seconds; a file as young may be another visitor's, just arriving under the same name


class Uploads:
    """Files of visitors in one private folder.

    Gradio names uploads by their content, so that two visitors may share a file: it goes with the last of them.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owners: dict[Path, set[str]] = {}
        self._own: dict[str, Path] = {}
        self._lock = threading.Lock()

    def note(self, session: str, path: str | os.PathLike[str]) -> None:
        """Remembers that a visitor uploaded a file."""
        with self._lock:
            self._owners.setdefault(Path(path), set()).add(session)

    def own_folder(self, session: str) -> Path:
        """A folder of the visitor's own, that nobody guesses, for files to download; earlier ones are removed."""
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        with self._lock:
            earlier, self._own[session] = self._own.get(session), folder
        if earlier is not None:
            shutil.rmtree(earlier, ignore_errors=True)
        return folder

    def forget(self, session: str) -> None:
        """Removes what belongs to a visitor who has left, and to nobody else."""
        with self._lock:
            if session in self._own:
                shutil.rmtree(self._own.pop(session), ignore_errors=True)
            for path, owners in list(self._owners.items()):
                owners.discard(session)
                if not owners:
                    del self._owners[path]
                    _remove_unless_new(path)


def _remove_unless_new(path: Path) -> None:
    with suppress(OSError):
        if time.time() - path.stat().st_ctime > _GRACE:
            path.unlink()
            path.parent.rmdir()
