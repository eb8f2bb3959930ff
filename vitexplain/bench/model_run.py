"""One model on all images: every method by every metric, as far as they apply."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..errors import ExplanationWarning, VitExplainError
from ..keys import digest
from ..models.loading import LoadedModel, load_model
from ..randomness import seeded
from .chunk_run import ANNOTATIONS, ChunkRun, Plan
from .cost import MOST_IMAGES, measure_cost
from .entries import ModelEntry
from .store import Columns


@dataclass(frozen=True)
class Refusal:
    """What could not be measured.

    Attributes:
        model: label.
        method: label; None: no method.
        metric: label; None: no metric.
        reason: why.
    """

    model: str
    method: str | None
    metric: str | None
    reason: str


@dataclass
class ModelOutcome:
    """What a model's run left.

    Attributes:
        label: its name in tables.
        identity: what tells it from others.
        predictions: one row an image of the data, those that take no part too; see `predict`.
        cells: for each method and metric the keys of its cells, chunk by chunk.
        costs: for each method ``seconds`` and ``forward_seconds`` an image, ``images``, and ``device``.
        refusals: what could not be measured.
    """

    label: str
    identity: dict[str, Any]
    predictions: Columns = field(default_factory=dict)
    cells: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Images that could not be used, and why."""
        failed = self.predictions["failure"] != ""
        return list(zip(self.predictions["image"][failed], self.predictions["failure"][failed], strict=True))


def run_model(plan: Plan, entry: ModelEntry, progress: tqdm[Any]) -> ModelOutcome:
    """Measures every method by every metric on one model, as far as that is not stored.

    What a model, or the data, does not allow is listed as a refusal; the rest goes on.

    Args:
        plan: the benchmark.
        entry: the model.
        progress: counts images.

    Raises:
        VitExplainError: the model cannot be loaded, or a cell cannot be written.
    """
    model = open_model(entry, plan.configuration.device, plan.configuration.dtype)
    identity = {name: value for name, value in model.identity().items() if name != "weights"}
    outcome = ModelOutcome(entry.label, identity)
    run = _ModelRun(plan, model, digest("model", identity), outcome)
    progress.set_description(entry.label)
    parts: list[Columns] = []
    for chunk in plan.images.chunks(plan.configuration.chunk_size):
        at = ChunkRun(plan, model, run.key, chunk)
        parts.append(at.predictions)
        if at.names:
            run.complete(at)
        progress.update(len(chunk.names))
    outcome.predictions = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, reason in outcome.failures:
        warnings.warn(f"{entry.label} leaves out {name!r}: {reason}", ExplanationWarning, stacklevel=3)
    return outcome


def open_model(entry: ModelEntry, device: str, dtype: str) -> LoadedModel:
    """The model of an entry, in the precision asked for.

    Raises:
        VitExplainError: it cannot be loaded.
    """
    try:
        model = load_model(
            entry.name,
            checkpoint=entry.checkpoint,
            labels=entry.labels,
            preprocessing=entry.preprocessing,
            device=device,
        )
    except VitExplainError as error:
        raise type(error)(f"the model {entry.label!r}: {error}") from error
    model.model.to(getattr(torch, dtype))
    return model


@dataclass
class _ModelRun:
    plan: Plan
    model: LoadedModel
    key: str
    outcome: ModelOutcome

    def __post_init__(self) -> None:
        self.pairs = [(method, metric) for method in self.plan.methods for metric in self.plan.metrics]
        for label, metric in self.plan.metrics.items():
            lacking = sorted(metric.info.requires & ANNOTATIONS - self.plan.images.somewhere)
            if lacking:
                self._refuse(None, label, f"it requires {', '.join(lacking)}, which the data does not have")

    def complete(self, at: ChunkRun) -> None:
        """Computes what a chunk lacks."""
        missing = [pair for pair in self.pairs if not at.has_statistics(*pair)]
        self.plan.counts["kept"] += len(self.pairs) - len(missing)
        wanted = list(dict.fromkeys(method for method, _ in missing))
        self._explain(at, [method for method in wanted if at.scores(method) is None])
        for method, metric in missing:
            if (method, metric) in self.pairs:
                try:
                    at.measure(method, metric)
                except VitExplainError as error:
                    self._refuse(method, metric, str(error))
        for pair in self.pairs:
            self.outcome.cells.setdefault(pair, []).append(at.metric_key(*pair))
        self._measure_costs(at)

    def _explain(self, at: ChunkRun, methods: list[str]) -> None:
        try:
            at.explain(methods)
        except VitExplainError:
            for method in methods:  # which of them was it?
                try:
                    at.explain([method])
                except VitExplainError as error:
                    self._refuse(method, None, str(error))

    def _measure_costs(self, at: ChunkRun) -> None:
        """Once for each method, on the first images that there are."""
        images = min(len(at.names), self.plan.configuration.batch_size, MOST_IMAGES)
        for label in dict.fromkeys(method for method, _ in self.pairs if method not in self.outcome.costs):
            method = self.plan.methods[label]
            key = digest("cost", self.key, method.info.name, method.options, images, _device_name(self.model.device))
            stored = self.plan.store.read(key)
            if stored is None:
                with seeded(0, self.model.device):
                    cost = measure_cost(method, self.model.subject, at.inputs[:images], at.targets[:images])
                stored = {name: np.array([value]) for name, value in cost.items()}
                self.plan.store.write(key, stored, {**self.plan.circumstances, "cell": "cost", "method": label})
            self.outcome.costs[label] = {
                **{name: float(value[0]) for name, value in stored.items()},
                "device": _device_name(self.model.device),
            }

    def _refuse(self, method: str | None, metric: str | None, reason: str) -> None:
        """Takes pairs out of the run; None stands for all."""
        refused = [pair for pair in self.pairs if method in (None, pair[0]) and metric in (None, pair[1])]
        self.pairs = [pair for pair in self.pairs if pair not in refused]
        for pair in refused:
            self.outcome.cells.pop(pair, None)
        self.outcome.refusals.append(Refusal(self.outcome.label, method, metric, " ".join(reason.split())))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
