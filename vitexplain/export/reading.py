"""Reading pictures: in the threads of this process, or in processes that may die of what they read."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError
from ..preprocessing import Preprocessing
from .entries import Entry, prepare


@dataclass(frozen=True, eq=False)
class Reading:
    """What could be read of some images.

    Attributes:
        rows: which ones, b of them.
        inputs: (b, 3, H, W) float32; None where nothing could be read.
        errors: reasons for the others, by row.
    """

    rows: list[int]
    inputs: npt.NDArray[np.float32] | None
    errors: dict[int, str]


Reader: TypeAlias = Callable[[Sequence[Entry], Preprocessing], Reading]
"""Reads images; may be called from several threads."""


def read(entries: Sequence[Entry], preprocessing: Preprocessing) -> Reading:
    """Reads images one after another; whatever a decoder throws is its image's reason."""
    rows, inputs, errors = list[int](), list[npt.NDArray[np.float32]](), dict[int, str]()
    for row, entry in enumerate(entries):
        try:
            inputs.append(prepare(entry, preprocessing).numpy())
            rows.append(row)
        except InputError as error:
            errors[row] = str(error)
        except Exception as error:  # a fault of a decoder must not take the other images along
            errors[row] = f"{entry.path!r} cannot be prepared: {type(error).__name__}: {error}"
    return Reading(rows, np.stack(inputs) if inputs else None, errors)


@contextmanager
def isolated_readers(workers: int) -> Iterator[Reader]:
    """Reads in processes; where one dies, its images are read again one by one, and the culprit gets its reason.

    Args:
        workers: how many processes.
    """
    pools = _Pools(workers)

    def read_apart(entries: Sequence[Entry], preprocessing: Preprocessing) -> Reading:
        pool = pools.current
        try:
            return pool.submit(read, entries, preprocessing).result()
        except BrokenProcessPool:
            pools.replace(pool)
            return _one_by_one(entries, preprocessing)

    try:
        yield read_apart
    finally:
        pools.current.shutdown(cancel_futures=True)


class _Pools:
    """The pool of processes in use, replaced when it is broken; once, however many threads notice.

    Args:
        workers: how many processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._lock = workers, threading.Lock()
        self.current = _pool(workers)

    def replace(self, broken: ProcessPoolExecutor) -> None:
        with self._lock:
            if self.current is broken:
                self.current = _pool(self._workers)


def _one_by_one(entries: Sequence[Entry], preprocessing: Preprocessing) -> Reading:
    parts = []
    pool = _pool(1)
    try:
        for entry in entries:
            try:
                parts.append(pool.submit(read, [entry], preprocessing).result())
            except BrokenProcessPool:
                pool = _pool(1)
                reason = f"{entry.path!r} ended the process that read it: a fault of its decoder, or too little memory"
                parts.append(Reading([], None, {0: reason}))
    finally:
        pool.shutdown()
    inputs = [part.inputs for part in parts if part.inputs is not None]
    return Reading(
        [row for row, part in enumerate(parts) if part.rows],
        np.concatenate(inputs) if inputs else None,
        {row: reason for row, part in enumerate(parts) for reason in part.errors.values()},
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that share no memory with this one, whose threads must not be forked."""
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, initializer=_begin)


def _begin() -> None:
    """Runs first in each process: one thread, and Ctrl-C is for the process that gives the work."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
