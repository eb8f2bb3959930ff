"""The pipeline of an export: pictures are read ahead, explained in batches, and drawn while the next are explained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..errors import VitExplainError
from ..explanation import Explanation
from ..keys import seed_of
from ..method import Method
from ..metrics.batches import explain_quietly
from ..models.loading import LoadedModel
from ..randomness import seeded
from .ahead import BoundedWork, ahead
from .entries import Entry
from .reading import Reader, isolated_readers, read
from .settings import ExportSettings
from .shard import MapShape, ShardResult
from .views import draw, encode


@dataclass(frozen=True, eq=False)
class ShardTask:
    """Images that are committed together.

    Attributes:
        index: number of the shard.
        start: number of its first image in the export.
        entries: the images.
        positions: places in the shard of those that are computed; the others keep what is committed of them.
    """

    index: int
    start: int
    entries: Sequence[Entry]
    positions: Sequence[int]

    @classmethod
    def whole(cls, index: int, start: int, entries: Sequence[Entry]) -> ShardTask:
        """All images are computed."""
        return cls(index, start, entries, range(len(entries)))

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the shard is kept."""
        return len(self.positions) == len(self.entries)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images of a shard that are computed together.

    Attributes:
        task: the shard.
        rows: their places in it.
        last: nothing of the shard comes after it.
    """

    task: ShardTask
    rows: Sequence[int]
    last: bool


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What could be read of a batch.

    Attributes:
        positions: b places in the shard.
        inputs: (b, 3, H, W); None where nothing could be read.
        errors: reasons by place, for the others.
    """

    positions: list[int]
    inputs: Tensor | None
    errors: dict[int, str]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Explains shards of images.

    Attributes:
        model: the model.
        methods: by label.
        settings: of the export.
    """

    model: LoadedModel
    methods: Mapping[str, Method]
    settings: ExportSettings

    @cached_property
    def shapes(self) -> dict[str, MapShape]:
        """What each method's maps look like, found out on one grey image.

        Raises:
            VitExplainError: a method cannot explain this model, or the model has no such class.
        """
        height, width = self.model.preprocessing.size
        explanations = self._explain(torch.zeros(1, 3, height, width), None, [0])
        return {
            label: MapShape(each.grid, tuple(each.diagnostics), each.signed, each.extent)
            for label, each in zip(self.methods, explanations, strict=True)
        }

    def run(
        self, tasks: Sequence[ShardTask], progress: Callable[[int], object] = lambda images: None
    ) -> Generator[ShardResult, None, None]:
        """Explains shards, one after another.

        An image that cannot be explained gets its reason; everything else is not affected.

        Args:
            tasks: the shards.
            progress: called with the number of images that were done since it was called last.

        Yields:
            Results in the order of the tasks.
        """
        workers = self.settings.workers
        with (
            isolated_readers(workers) if self.settings.isolate else nullcontext(read) as reader,
            ThreadPoolExecutor(workers, "read") as readers,
            ThreadPoolExecutor(workers, "draw") as painters,
        ):
            drawing = BoundedWork(painters, 2 * workers)
            result: ShardResult | None = None
            try:
                for batch, loaded in ahead(partial(self._load, reader), self._batches(tasks), readers, workers + 1):
                    if result is None:
                        task = batch.task
                        result = ShardResult.empty(
                            task.index, len(task.entries), self.settings.num_targets, self.shapes
                        )
                    for position, reason in loaded.errors.items():
                        result.errors[position] = reason
                    self._explain_batch(batch.task, loaded, result, drawing)
                    progress(len(batch.rows))
                    if batch.last:
                        drawing.finish()
                        yield result
                        result = None
            finally:
                readers.shutdown(cancel_futures=True)
                painters.shutdown(cancel_futures=True)

    def _batches(self, tasks: Sequence[ShardTask]) -> Iterator[_Batch]:
        """Batches never reach over a shard's end, so that a shard is computed alike whenever it is computed."""
        for task in tasks:
            count = len(task.positions)
            for start in range(0, count, self.settings.batch_size):
                end = min(start + self.settings.batch_size, count)
                yield _Batch(task, task.positions[start:end], end == count)

    def _load(self, reader: Reader, batch: _Batch) -> _Loaded:
        """Reads a batch; runs in a worker."""
        entries = [batch.task.entries[position] for position in batch.rows]
        found = reader(entries, self.model.preprocessing)
        errors = {batch.rows[row]: reason for row, reason in found.errors.items()}
        positions = [batch.rows[row] for row in found.rows]
        if found.inputs is None:
            return _Loaded(positions, None, errors)
        inputs = torch.from_numpy(found.inputs)
        return _Loaded(positions, inputs.pin_memory() if self.model.device.type == "cuda" else inputs, errors)

    def _explain_batch(self, task: ShardTask, loaded: _Loaded, result: ShardResult, drawing: BoundedWork) -> None:
        if loaded.inputs is None:
            return
        inputs = loaded.inputs.to(self.model.device, non_blocking=True)
        named = [task.entries[position].target for position in loaded.positions]
        for own in (False, True):  # images with a class of their own, and those without, are explained apart
            chosen = [row for row, target in enumerate(named) if (target is not None) == own]
            if chosen:
                part = inputs if len(chosen) == len(named) else inputs[chosen]
                target = torch.tensor([named[row] for row in chosen]) if own else None
                positions = [loaded.positions[row] for row in chosen]
                self._explain_part(task, part, target, positions, result, drawing)

    def _explain_part(
        self,
        task: ShardTask,
        inputs: Tensor,
        target: Tensor | None,
        positions: list[int],
        result: ShardResult,
        drawing: BoundedWork,
    ) -> None:
        try:
            explanations = self._explain(inputs, target, [task.start + position for position in positions])
        except VitExplainError as error:
            if len(positions) == 1:
                result.errors[positions[0]] = f"{task.entries[positions[0]].path!r} cannot be explained: {error}"
                return
            for row, position in enumerate(positions):  # one of them is at fault
                own = None if target is None else target[row : row + 1]
                self._explain_part(task, inputs[row : row + 1], own, [position], result, drawing)
            return
        result.put(positions, explanations)
        if self.settings.view != "none":
            drawing.give(partial(self._draw, positions, explanations, result))

    def _explain(self, inputs: Tensor, target: Tensor | None, numbers: Sequence[int]) -> list[Explanation]:
        """One explanation a method: a shared capture for those that draw no lots, a stream an image for the others."""
        if target is None and self.settings.targets:
            target = torch.tensor([self.settings.targets] * len(inputs))
        plain = {label: each for label, each in self.methods.items() if not each.info.stochastic}
        found: dict[str, Explanation] = {}
        if plain:
            explanations = explain_quietly(list(plain.values()), self.model.subject, inputs, target)
            found = dict(zip(plain, explanations, strict=True))
        for label, method in self.methods.items():
            if label not in found:
                found[label] = self._explain_one_by_one(method, inputs, target, numbers)
        return [found[label] for label in self.methods]

    def _explain_one_by_one(
        self, method: Method, inputs: Tensor, target: Tensor | None, numbers: Sequence[int]
    ) -> Explanation:
        parts = []
        for row, number in enumerate(numbers):
            own = None if target is None else target[row : row + 1]
            with seeded(seed_of("export", self.settings.seed, number), self.model.device):
                parts += explain_quietly([method], self.model.subject, inputs[row : row + 1], own)
        return Explanation.concatenate(parts)

    def _draw(self, positions: list[int], explanations: list[Explanation], result: ShardResult) -> None:
        """Draws and encodes a batch; runs in a painter."""
        pictures = explanations[0].pictures() if self.settings.view == "overlay" else None
        for label, explanation in zip(self.methods, explanations, strict=True):
            for position, drawn in zip(positions, draw(explanation, self.settings.view, pictures), strict=True):
                for number, picture in enumerate(drawn):
                    result.views[position, label, number] = encode(picture, self.settings.view_format)
