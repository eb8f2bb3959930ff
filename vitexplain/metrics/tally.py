"""A metric over a data set: update, merge, compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from .metric import Metric, MetricBatch, diagnose

Rows = dict[str, npt.NDArray[np.float64]]
"""Statistics by name, one row an image: (n,) or (n, S)."""


@dataclass(frozen=True)
class Summary:
    """A metric's figures over a data set, and what they rest on.

    Attributes:
        figures: value of each figure; NaN where no image allowed it.
        images: how many were given.
        unmeasured: of these, how many lack a statistic (it is NaN and counts nowhere).
        broken: of these, maps with NaN or infinite scores.
        constant: maps that are flat, so that any order of patches is as good; they count in the figures.
        tied: mean share of patches whose score another patch has too, in [0, 1].
    """

    figures: Mapping[str, float]
    images: int
    unmeasured: int
    broken: int
    constant: int
    tied: float


class Tally:
    """Collects the statistics of one metric, batch by batch; parts from several processes merge.

    ::

        tally = Tally(create_metric("deletion"))
        for batch in batches:
            tally.update(batch)
        print(tally.compute())

    Args:
        metric: the configured metric.
        rows: statistics collected earlier, as `rows` gives them.
    """

    def __init__(self, metric: Metric, rows: Mapping[str, npt.ArrayLike] | None = None) -> None:
        self.metric = metric
        self._parts: list[Rows] = [] if rows is None else [{name: np.asarray(value) for name, value in rows.items()}]

    def update(self, batch: MetricBatch) -> Rows:
        """Measures a batch; returns its rows.

        Raises:
            InputError: the batch lacks something that the metric requires; the message names it.
        """
        rows = measure(self.metric, batch)
        self._parts.append(rows)
        return rows

    def merge(self, *others: Tally) -> Tally:
        """A tally of all their images.

        Raises:
            InputError: the metrics or their options differ.
        """
        for other in others:
            if other.metric != self.metric:
                raise InputError(
                    f"found {other.metric} to merge into {self.metric}, expected the same metric and options"
                )
        merged = Tally(self.metric)
        merged._parts = [part for tally in (self, *others) for part in tally._parts]
        return merged

    @property
    def rows(self) -> Rows:
        """All statistics, one row an image, in the order of the updates."""
        return concatenate(self._parts)

    def compute(self) -> Summary:
        """The figures over all images so far."""
        return summarise(self.metric, self.rows)


def measure(metric: Metric, batch: MetricBatch) -> Rows:
    """Statistics of each image of a batch, with ``broken``, ``constant`` and ``tied`` of `diagnose`.

    Maps with NaN or infinite scores are not measured: their statistics are NaN.

    Raises:
        InputError: the batch lacks something that the metric requires; the message names it.
    """
    missing = sorted(part for part in metric.info.requires if getattr(batch, part) is None)
    if missing:
        raise InputError(
            f"{metric.info.name} requires {', '.join(missing)}, which the batch does not have: pass "
            f"MetricBatch({', '.join(f'{part}=…' for part in missing)}), or take another metric"
        )
    found = diagnose(batch.scores)
    sound = ~found["broken"]
    rows = {name: value.double().cpu().numpy() for name, value in found.items()}
    if bool(sound.all()):
        statistics = metric.measure(batch)
    elif bool(sound.any()):
        statistics = {name: _spread(value, sound) for name, value in metric.measure(_select(batch, sound)).items()}
    else:
        zeros = replace(batch, scores=torch.zeros_like(batch.scores))
        statistics = {name: torch.full_like(value.double(), torch.nan) for name, value in metric.measure(zeros).items()}
    return rows | {name: value.double().cpu().numpy() for name, value in statistics.items()}


def summarise(metric: Metric, rows: Mapping[str, npt.NDArray[np.float64]]) -> Summary:
    """The figures of rows that `measure` gave.

    Raises:
        InputError: there are no rows.
    """
    if not rows or not len(rows["broken"]):
        raise InputError(f"{metric.info.name} was asked for its figures before any image was measured")
    statistics = own_statistics(rows)
    unmeasured = np.zeros(len(rows["broken"]), bool)
    for value in statistics.values():
        unmeasured |= np.isnan(value).reshape(len(value), -1).any(1)
    means = {name: torch.from_numpy(_mean(value)) for name, value in statistics.items()}
    figures = {name: float(value) for name, value in metric.summarise(means).items()}
    return Summary(
        figures,
        images=len(unmeasured),
        unmeasured=int(unmeasured.sum()),
        broken=int(rows["broken"].sum()),
        constant=int(rows["constant"].sum()),
        tied=float(np.nanmean(rows["tied"])),
    )


def own_statistics(rows: Mapping[str, npt.NDArray[np.float64]]) -> Rows:
    """The metric's own statistics, without the diagnosis of the map."""
    return {name: value for name, value in rows.items() if name not in ("broken", "constant", "tied")}


def concatenate(parts: Sequence[Rows]) -> Rows:
    """One table of several; a statistic that some parts lack is NaN there."""
    shapes = {name: value.shape[1:] for part in parts for name, value in part.items()}
    return {
        name: np.concatenate([part.get(name, np.full((len(part["broken"]), *shape), np.nan)) for part in parts]).astype(
            np.float64
        )
        for name, shape in shapes.items()
    }


def _mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # no image measured: NaN, on purpose
        return np.asarray(np.where(known, values, 0).sum(0) / known.sum(0))


def _select(batch: MetricBatch, chosen: Tensor) -> MetricBatch:
    indices = chosen.nonzero()[:, 0].tolist()
    tensors = {
        name: value[chosen.to(value.device)]
        for name in ("scores", "targets", "inputs", "labels", "masks")
        if (value := getattr(batch, name)) is not None
    }
    boxes = None if batch.boxes is None else [batch.boxes[index] for index in indices]
    return replace(batch, **tensors, boxes=boxes)


def _spread(values: Tensor, chosen: Tensor) -> Tensor:
    spread = values.new_full((len(chosen), *values.shape[1:]), torch.nan, dtype=torch.float64)
    spread[chosen.to(values.device)] = values.double()
    return spread
