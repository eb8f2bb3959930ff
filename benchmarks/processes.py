"""Measurements in processes of their own, forked from one that has libraries loaded and has measured nothing.

What starts a measurement is not forked itself: it has threads. It starts this module, which reads tasks and answers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import vitexplain
from vitexplain.errors import says_out_of_memory

ALLOCATOR: Mapping[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""glibc's settings where memory is measured: one arena; blocks from 64 KiB are mapped alone and unmapped when freed."""
OUT_OF_MEMORY = "out of memory"
"""How a row says so."""

_ENDING = 10.0
"""Seconds that all may take to end by themselves."""

Measure = Callable[..., Mapping[str, Any]]
"""Measures, and gives what can be written as JSON."""


class Processes:
    """Gives each measurement a process, one after the other, within its `with`.

    Args:
        loaded: modules that every process has from its start; those that do not import are left to it.
        settings: environment variables of every process, besides those that are set.
    """

    def __init__(self, loaded: Sequence[str], settings: Mapping[str, str] = ALLOCATOR) -> None:
        root = Path(vitexplain.__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self._environment = os.environ | dict(settings) | {"PYTHONPATH": path}
        self._command = [sys.executable, "-m", __name__, *loaded]
        self._parent = self._begun()

    def _begun(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Ends what runs, and what it started."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        with suppress(BrokenPipeError):
            self._parent.stdin.close()  # nobody asks any more
        with suppress(subprocess.TimeoutExpired):
            self._parent.wait(_ENDING)
        self._parent.kill()
        self._parent.wait()
        self._parent.stdout.close()

    def measure(self, measure: Measure, task: Sequence[Any], seconds: float | None = None) -> dict[str, Any] | str:
        """What ``measure(*task)`` gives in a process of its own; or how that failed, in a few words.

        Args:
            measure: a function of a module, which is found by its name there.
            task: its arguments, which can be written as JSON.
            seconds: when the process is killed; None for never.
        """
        module = measure.__module__
        if module == "__main__":  # of the process that asks
            module = sys.modules[module].__spec__.name  # type: ignore[union-attr]
        asked = json.dumps([module, measure.__qualname__, task, seconds])
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        with suppress(BrokenPipeError):
            print(asked, file=self._parent.stdin, flush=True)
        line = self._parent.stdout.readline()
        if not line:
            self._end()
            self._parent = self._begun()  # for the next one
            return "the process that starts the others has ended"
        answer: dict[str, Any] | str = json.loads(line)
        return answer


def serve(loaded: Sequence[str]) -> None:
    """Reads tasks, a line each, and writes an answer to each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when nobody asks any more
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
        for name in loaded:
            with suppress(Exception):  # it may not be installed, or not for what else is
                import_module(name)
        for line in sys.stdin:
            answer = _forked(answers.fileno(), *json.loads(line))
            print(json.dumps(answer), file=answers, flush=True)


def _forked(answers: int, module: str, name: str, task: Sequence[Any], seconds: float | None) -> dict[str, Any] | str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            for descriptor in (answers, reading, sys.stdin.fileno()):
                os.close(descriptor)
            answer = _attempted(module, name, task)
            with os.fdopen(writing, "w") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        # nobody asks before the answer: what else there is to read is the end of all asking
        ready = select.select([pipe, sys.stdin], [], [], seconds)[0]
        text = pipe.read() if pipe in ready else ""
    if not ready or sys.stdin in ready:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    exitcode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not ready:
        return f"took more than {seconds:.0f} s"
    found: dict[str, Any] | str = json.loads(text) if text else ending(exitcode)
    return found


def _attempted(module: str, name: str, task: Sequence[Any]) -> str:
    """The answer as JSON."""
    try:
        return json.dumps(dict(getattr(import_module(module), name)(*task)))
    except Exception as error:  # a peer may raise anything
        return json.dumps(failure(error))


def failure(error: Exception) -> str:
    """What a process raised, in a few words."""
    first = (str(error).splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"
    return OUT_OF_MEMORY if says_out_of_memory(text) else text


def ending(exitcode: int) -> str:
    """How a process ended that gave no answer, in a few words."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    return f"ended with status {exitcode} and no figure"


if __name__ == "__main__":
    serve(sys.argv[1:])
