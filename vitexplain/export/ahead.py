"""Working ahead in threads: results in order, and never more than a few waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def ahead(
    work: Callable[[_Task], _Result], tasks: Iterable[_Task], pool: Executor, depth: int
) -> Generator[tuple[_Task, _Result], None, None]:
    """Works on tasks in a pool while the consumer is busy, and hands out the results in the order of the tasks.

    Args:
        work: runs in the pool; what it raises is raised here in its turn.
        tasks: taken one after another, as late as possible.
        pool: runs the work.
        depth: how many tasks may be begun and not yet handed out.
    """
    waiting: deque[tuple[_Task, Future[_Result]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(work, task)))
            if len(waiting) >= depth:
                begun, future = waiting.popleft()
                yield begun, future.result()
        while waiting:
            begun, future = waiting.popleft()
            yield begun, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


class BoundedWork:
    """Tasks given to a pool of which at most a few are unfinished: giving one more waits for the oldest.

    Args:
        pool: runs the work.
        depth: how many may be unfinished.
    """

    def __init__(self, pool: Executor, depth: int) -> None:
        self._pool, self._depth = pool, depth
        self._waiting: deque[Future[None]] = deque()

    def give(self, work: Callable[[], None]) -> None:
        """Begins a task, and raises what an earlier one raised."""
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def finish(self) -> None:
        """Waits for all tasks, and raises what the first that failed raised."""
        while self._waiting:
            self._waiting.popleft().result()
