"""One model on one chunk of images: what is stored is read, what is missing is computed and committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.batches import ExampleBatch
from ..errors import InputError
from ..keys import digest, file_digest, own_code, seed_of
from ..method import Method
from ..metrics.batches import explain_quietly, explaining
from ..metrics.metric import Metric, MetricBatch, diagnose
from ..metrics.predictor import Predictor
from ..metrics.tally import Rows, measure, own_statistics
from ..models.loading import LoadedModel
from ..models.shipped import shipped_checkpoint
from ..randomness import seeded
from .configuration import BenchConfiguration
from .image_set import Chunk, ImageSet
from .predictions import predict, unread
from .store import CellStore, Columns

ANNOTATIONS = frozenset({"labels", "masks", "boxes"})
"""Parts of a metric batch that come from the data, not from the model."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What all models of a benchmark have in common.

    Attributes:
        configuration: of the benchmark, paths written out.
        methods: by label.
        metrics: by label.
        images: what is measured on.
        store: finished cells.
        counts: cells ``computed`` in this run, and ``kept`` from earlier ones.
        circumstances: noted with every cell; determines nothing.
    """

    configuration: BenchConfiguration
    methods: Mapping[str, Method]
    metrics: Mapping[str, Metric]
    images: ImageSet
    store: CellStore
    circumstances: Mapping[str, str]
    counts: dict[str, int] = field(default_factory=lambda: {"computed": 0, "kept": 0})


@dataclass(frozen=True, eq=False)
class ChunkRun:
    """A model on a chunk.

    Attributes:
        plan: the benchmark.
        model: the model.
        model_key: digest of what tells the model from others.
        chunk: the images.
    """

    plan: Plan
    model: LoadedModel
    model_key: str
    chunk: Chunk

    @cached_property
    def predictions(self) -> Columns:
        """One row an image of the chunk; see `predict`."""
        stored = self._stored(self._predictions_key, self.chunk.names)
        if stored is not None and not self._can_be_read_by_now(stored):
            return stored
        batch, failures = self._loaded
        settings, labels = (
            self.plan.configuration,
            {} if batch is None else dict(zip(batch.names, batch.labels, strict=True)),
        )
        found = predict(
            self.chunk.names,
            failures,
            labels,
            torch.zeros(0, 1) if batch is None else self._predictor.logits(batch.inputs),
            target=settings.target,
            only_correct=settings.only_correct,
        )
        self._commit(self._predictions_key, found, {"cell": "predictions"})
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The images that take part."""
        return tuple(self.predictions["image"][self.predictions["used"]].tolist())

    @property
    def targets(self) -> Tensor:
        """(B,) int64, the class explained of each image that takes part."""
        return torch.from_numpy(self.predictions["target"][self.predictions["used"]]).to(self.model.device)

    @cached_property
    def inputs(self) -> Tensor:
        """(B, 3, H, W), the images that take part, on the model's device."""
        batch, rows = self._used
        return batch.inputs[rows].to(self.model.device)

    def scores(self, method: str) -> npt.NDArray[np.float32] | None:
        """Stored scores (B, h, w) of a method; None where they are missing."""
        stored = self._stored(self._scores_key(method), self.names)
        return None if stored is None else stored["scores"]

    def explain(self, methods: Sequence[str]) -> None:
        """Computes and commits the scores of methods; all that draw no lots share one capture.

        Raises:
            VitExplainError: a method cannot explain this model.
        """
        shared = [each for each in methods if not self.plan.methods[each].info.stochastic]
        if shared:
            chosen = [self.plan.methods[each] for each in shared]
            explanations = explain_quietly(
                chosen, self.model.subject, self.inputs, self.targets, self.plan.configuration.batch_size
            )
            for label, explanation in zip(shared, explanations, strict=True):
                self._commit_scores(label, explanation.scores)
        for label in methods:
            if label not in shared:
                self._commit_scores(label, self._explain_one_by_one(self.plan.methods[label]))

    def metric_key(self, method: str, metric: str) -> str:
        """Key of a metric's statistics."""
        chosen = self.plan.metrics[metric]
        own, shown = own_code(type(chosen)), self._shown(chosen)
        return digest("metric", self._scores_key(method), chosen.info.name, chosen.options, shown, *own)

    def has_statistics(self, method: str, metric: str) -> bool:
        """Whether a metric's statistics are stored."""
        return self._stored(self.metric_key(method, metric), self.names) is not None

    def measure(self, method: str, metric: str) -> None:
        """Computes and commits a metric's statistics on the stored scores of a method.

        Raises:
            VitExplainError: the metric cannot be measured on these images.
        """
        found = self.scores(method)
        assert found is not None  # whoever measures has explained before
        scores, chosen = torch.from_numpy(found).to(self.model.device), self.plan.metrics[metric]
        seed = seed_of("metric", self.plan.configuration.seed, self.names)
        with seeded(seed, self.model.device):
            rows = self._rows(chosen, self.plan.methods[method], scores)
        columns: Columns = {"image": np.array(self.names, object), **rows}
        self._commit(self.metric_key(method, metric), columns, {"cell": "metric", "method": method, "metric": metric})

    def _rows(self, metric: Metric, method: Method, scores: Tensor) -> Rows:
        """Statistics of all images, NaN where one lacks what the metric requires of the data."""
        label = torch.from_numpy(self.predictions["label"][self.predictions["used"]])
        able = label >= 0 if "labels" in metric.info.requires else torch.ones_like(label, dtype=torch.bool)
        rows = {name: value.double().cpu().numpy() for name, value in diagnose(scores).items()}
        if not bool(able.any()):
            return rows
        shown = self._shown(metric)
        masks, boxes = self._masks if "masks" in shown else None, self._boxes if "boxes" in shown else None
        chosen, device = able.to(self.model.device), self.model.device
        size = (self.inputs.shape[-2], self.inputs.shape[-1])
        batch = MetricBatch(
            scores[chosen],
            self.targets[chosen],
            self.inputs if bool(able.all()) else self.inputs[chosen],
            self._predictor,
            labels=label[able].to(device) if bool((label[able] >= 0).all()) and "labels" in shown else None,
            masks=None if masks is None else masks[able].to(device),
            boxes=None if boxes is None else [boxes[index] for index in able.nonzero()[:, 0].tolist()],
            explain=explaining(method, self.model.subject, self.plan.configuration.batch_size),
            extent=self.model.subject.adapter.extent(size, (scores.shape[-2], scores.shape[-1])),
        )
        own = own_statistics(measure(metric, batch))
        return rows | {name: _spread(value, able.numpy(), len(scores)) for name, value in own.items()}

    def _shown(self, metric: Metric) -> list[str]:
        """The annotations that a metric is shown; they hang on all selected images, so that methods can be compared.

        Labels where it requires them, or where all images have them; masks and boxes where any image has them.
        """
        images = self.plan.images
        labels = {"labels"} if images.labelled or "labels" in metric.info.requires else set()
        return sorted(images.somewhere - {"labels"} | labels)

    def _explain_one_by_one(self, method: Method) -> Tensor:
        """Each image with its own stream of random numbers, whatever else is in the batch."""
        maps = []
        for index, name in enumerate(self.names):
            with seeded(seed_of("method", self.plan.configuration.seed, name), self.model.device):
                one = slice(index, index + 1)
                images, target = self.inputs[one], self.targets[one]
                maps.append(explain_quietly([method], self.model.subject, images, target)[0].scores)
        return torch.cat(maps)

    def _can_be_read_by_now(self, predictions: Columns) -> bool:
        """Whether an image can be read now that could not: a disk that did not answer says nothing of its content."""
        failed = unread(predictions)
        places = [place for place, again in zip(self.chunk.places, failed, strict=True) if again]
        return any(self.plan.images.can_be_read(place, self.model.preprocessing) for place in places)

    @cached_property
    def _loaded(self) -> tuple[ExampleBatch | None, Mapping[str, str]]:
        return self.plan.images.load(self.chunk, self.model.preprocessing)

    @cached_property
    def _used(self) -> tuple[ExampleBatch, list[int]]:
        """What was read, and the rows in it of the images that take part."""
        batch, names = self._loaded[0], set(self.names)
        if batch is None or not names <= set(batch.names):
            raise InputError(f"found images of {self.chunk.names[0]!r} and after changed during the run; run again")
        return batch, [index for index, name in enumerate(batch.names) if name in names]

    @property
    def _masks(self) -> Tensor:
        """(B, H, W) int8, all left out where an image has no mask."""
        batch, rows = self._used
        if batch.masks is None:
            return torch.full((len(rows), *batch.inputs.shape[2:]), -1, dtype=torch.int8)
        return batch.masks[rows]

    @property
    def _boxes(self) -> list[Tensor]:
        """B tensors (n, 4), empty where an image has no box."""
        batch, rows = self._used
        return [torch.zeros(0, 4).double() if batch.boxes is None else batch.boxes[row] for row in rows]

    @cached_property
    def _predictor(self) -> Predictor:
        settings = self.plan.configuration
        return Predictor.of(self.model.subject, settings.batch_size, compiled=settings.compiled)

    @property
    def _predictions_key(self) -> str:
        settings = self.plan.configuration
        return digest("predictions", self.model_key, self.chunk.key, settings.target, settings.only_correct)

    def _scores_key(self, method: str) -> str:
        chosen, seed = self.plan.methods[method], self.plan.configuration.seed
        drawn = seed if chosen.info.stochastic else None
        learned = [] if (found := self._checkpoint(chosen)) is None else [file_digest(found)]
        extent = self.model.subject.adapter.extent(self.model.preprocessing.size)
        apart = [] if extent is None else [list(extent)]  # most models' patches cover just the image
        own = own_code(type(chosen))
        return digest("scores", self._predictions_key, chosen.info.name, chosen.options, drawn, *learned, *apart, *own)

    def _checkpoint(self, method: Method) -> Path | None:
        """What a method learned, if it does and has; its content counts, as training again may write the same file."""
        if not method.info.trainable:
            return None
        given = method.options.get("checkpoint")
        path = Path(given) if given else shipped_checkpoint(method.info.name, self.model.model)
        return path if path is not None and path.is_file() else None

    def _stored(self, key: str, names: Sequence[str]) -> Columns | None:
        """A stored cell, if it is about these images."""
        columns = self.plan.store.read(key)
        return columns if columns is not None and tuple(columns["image"].tolist()) == tuple(names) else None

    def _commit_scores(self, method: str, scores: Tensor) -> None:
        columns: Columns = {
            "image": np.array(self.names, object),
            "target": self.targets.cpu().numpy(),
            "scores": scores.float().cpu().numpy(),
        }
        self._commit(self._scores_key(method), columns, {"cell": "scores", "method": method})

    def _commit(self, key: str, columns: Columns, about: Mapping[str, str]) -> None:
        self.plan.store.write(key, columns, {**self.plan.circumstances, **about})
        self.plan.counts["computed"] += 1


def _spread(values: npt.NDArray[np.float64], rows: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.float64]:
    spread = np.full((count, *values.shape[1:]), np.nan)
    spread[rows] = values
    return spread
