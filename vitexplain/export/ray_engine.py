"""The same pipeline in many processes, on one machine or several: shards handed out by Ray Data to a pool of actors."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from ..errors import VitExplainError
from .entries import Entry
from .extra import require
from .pipeline import Pipeline, ShardTask
from .shard import ShardResult

_PAYLOAD = "payload"
_PATIENCE = 10  # seconds


def run_on_ray(
    pipeline: Pipeline, tasks: Sequence[ShardTask], progress: Callable[[int], object]
) -> Generator[ShardResult, None, None]:
    """Explains shards on Ray actors, each with the model; the results come back to this process, which commits them.

    A worker that dies is replaced, and the shard it was working on is done again. Files have to be readable under the
    same paths wherever there is a worker.

    Args:
        pipeline: what every actor runs; the model travels to the actors once.
        tasks: the shards.
        progress: called with the number of images that were done since it was called last.

    Yields:
        Results in the order in which they are finished.

    Raises:
        VitExplainError: Ray is not installed, or the cluster cannot be reached.
    """
    require("ray")
    if not tasks:
        return
    counts = {task.index: len(task.positions) for task in tasks}
    with _cluster(pipeline.settings.ray_address):
        for row in _explained(pipeline, tasks):
            result = ShardResult.unpack(row[_PAYLOAD])
            progress(counts[result.index])
            yield result


def _explained(pipeline: Pipeline, tasks: Sequence[ShardTask]) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import ActorPoolStrategy, from_items

    on_gpu = pipeline.model.device.type == "cuda"
    count = min(pipeline.settings.ray_workers or _default_workers(on_gpu), len(tasks))
    threads = _threads_each(count)
    settings = replace(pipeline.settings, engine="local", workers=max(2, threads))
    dataset = from_items([{"index": task.index} for task in tasks], override_num_blocks=len(tasks)).map_batches(
        _ShardWorker,
        fn_constructor_args=(
            [ray.put(replace(pipeline, settings=settings))],  # in lists, references are not resolved on the way
            {task.index: [ray.put(_plain(task))] for task in tasks},
            threads,
        ),
        batch_size=1,
        # one shard at a time for each actor, so that the last shards are spread over all of them
        compute=ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
        num_cpus=0 if on_gpu else threads,
        num_gpus=1 if on_gpu else 0,
    )
    yield from dataset.iter_rows()


class _ShardWorker:
    """An actor: one process with the model.

    Args:
        pipeline: a list of one reference to the pipeline.
        tasks: for each shard a list of one reference to it, as plain values.
        threads: cores that this process may use.
    """

    def __init__(self, pipeline: list[Any], tasks: dict[int, list[Any]], threads: int) -> None:
        import ray
        import torch

        torch.set_num_threads(threads)
        self.pipeline: Pipeline = ray.get(pipeline[0])
        self.tasks = tasks

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        import ray

        tasks = [_task(ray.get(self.tasks[int(index)][0])) for index in batch["index"]]
        return {_PAYLOAD: [result.pack() for result in self.pipeline.run(tasks)]}


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """The Ray cluster that is there already, one at an address, or one of this machine for the time being."""
    import ray

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level, started = context.enable_progress_bars, logger.level, not ray.is_initialized()
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        if started:
            _join(address)
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
        if started:
            ray.shutdown()


def _join(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        _knock(address)
        ray.init(address=address or "local", include_dashboard=False, logging_level=logging.WARNING)
    except OSError as error:
        raise VitExplainError(
            f"the Ray cluster at {address!r} cannot be reached: {error}. Check --ray-address (HOST:PORT), set "
            "RAY_AUTH_MODE=token if the cluster asks for a token, or leave the address out to use this machine"
        ) from error


def _knock(address: str | None) -> None:
    """Tries the port of an address; Ray itself waits for minutes where nobody answers.

    Raises:
        OSError: nobody answers.
    """
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _default_workers(on_gpu: bool) -> int:
    import ray

    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 1)) if on_gpu else int(resources.get("CPU", 1)) // 2)


def _threads_each(workers: int) -> int:
    """Cores for each of so many workers, and not more than one machine has."""
    import ray

    largest = max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
    return max(1, min(int(largest), int(ray.cluster_resources().get("CPU", 1)) // workers))


def _plain(task: ShardTask) -> dict[str, Any]:
    entries, positions = [asdict(entry) for entry in task.entries], list(task.positions)
    return {"index": task.index, "start": task.start, "entries": entries, "positions": positions}


def _task(plain: dict[str, Any]) -> ShardTask:
    return ShardTask(**{**plain, "entries": [Entry(**entry) for entry in plain["entries"]]})
