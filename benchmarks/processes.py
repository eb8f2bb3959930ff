"""A measurement in a process of its own, forked from one that has the libraries loaded and has measured nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from vitexplain.errors import says_out_of_memory

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc's settings in every process: one arena; blocks from 64 KiB are mapped alone and unmapped when freed."""
OUT_OF_MEMORY = "out of memory"
"""How a row says so."""

_LOADED = ("vitexplain.benchmarks.memory", "captum.attr", "pytorch_grad_cam", "torchcam.methods", "quantus")
_CONTEXT = multiprocessing.get_context("forkserver")

Measure = Callable[..., Mapping[str, Any]]


def in_process(measure: Measure, task: Sequence[Any], seconds: float | None = None) -> dict[str, Any] | str:
    """What ``measure(*task)`` gives in a process of its own; or how that failed, in a few words.

    Args:
        measure: a function of a module, which is found by its name there.
        task: its arguments.
        seconds: when the process is killed; None for never.
    """
    _CONTEXT.set_forkserver_preload(list(_LOADED))
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_answer, args=(sender, measure, task), daemon=True)
    before = dict(os.environ)
    os.environ.update(ALLOCATOR)  # read where the process that forks begins: by the first of these calls
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()
    try:
        if not receiver.poll(seconds):
            return f"took more than {seconds:.0f} s"
        answer: dict[str, Any] | str = receiver.recv()
        return answer
    except EOFError:
        process.join()
        return ending(process.exitcode or 0)
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, measure: Measure, task: Sequence[Any]) -> None:
    try:
        answer: dict[str, Any] | str = dict(measure(*task))
    except Exception as error:  # a peer may raise anything
        answer = failure(error)
    sender.send(answer)


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
