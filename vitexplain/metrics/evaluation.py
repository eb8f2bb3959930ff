"""Methods, images and metrics in; figures with intervals out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor, nn

from ..api import get_explainer
from ..errors import InputError, UnknownNameError
from ..explainer import Explainer
from ..models.adapter import ModelAdapter
from ..options import Configurable
from ..subject import Subject
from ..targets import Target
from .batches import metric_batches
from .catalogue import create_metric
from .metric import Metric
from .ranking import Comparison, compare_rows
from .statistics import Estimate, check_resampling, estimates
from .tally import Rows, Summary, Tally, summarise

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from ..subject import Images

_Thing = TypeVar("_Thing")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What several metrics found out about several methods on the same images.

    Attributes:
        metrics: the configured metrics by label.
        rows: statistics of every image, by the labels of method and metric.
        settings: `confidence`, `resamples` and `seed` of the intervals.
    """

    metrics: Mapping[str, Metric]
    rows: Mapping[tuple[str, str], Rows]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Labels of the methods."""
        return list(dict.fromkeys(method for method, _ in self.rows))

    @cached_property
    def estimates(self) -> dict[tuple[str, str], dict[str, Estimate]]:
        """Figures with intervals, by the labels of method and metric."""
        return {key: estimates(self.metrics[key[1]], rows, **self.settings) for key, rows in self.rows.items()}

    @cached_property
    def summaries(self) -> dict[tuple[str, str], Summary]:
        """Figures and what they rest on, by the labels of method and metric."""
        return {key: summarise(self.metrics[key[1]], rows) for key, rows in self.rows.items()}

    def table(self) -> list[dict[str, Any]]:
        """One row a method, metric and figure.

        Each has ``method``, ``metric``, ``figure``; ``value``, ``low``, ``high``, ``n`` of `Estimate`; and ``images``,
        ``unmeasured``, ``broken``, ``constant``, ``tied`` of `Summary`.
        """
        return [
            {
                "method": method,
                "metric": metric,
                "figure": figure,
                **{each.name: getattr(estimate, each.name) for each in fields(estimate)},
                **{each.name: getattr(summary, each.name) for each in fields(summary) if each.name != "figures"},
            }
            for (method, metric), summary in self.summaries.items()
            for figure, estimate in self.estimates[method, metric].items()
        ]

    def compare(self, metric: str | None = None, figure: str | None = None, **options: Any) -> Comparison:
        """Compares the methods by one figure.

        Args:
            metric: its label; the only metric by default.
            figure: its name; the metric's most important one by default.
            **options: of `compare_rows`.

        Raises:
            InputError: fewer than two methods, or several metrics of which none is named.
            UnknownNameError: the metric was not measured, or has no such figure.
        """
        if metric is None and len(self.metrics) > 1:
            raise InputError(f"found the metrics {', '.join(self.metrics)}, expected the label of one to compare by")
        label = next(iter(self.metrics)) if metric is None else metric
        if label not in self.metrics:
            raise UnknownNameError.listing("measured metric", label, self.metrics)
        rows = {method: self.rows[method, label] for method in self.methods}
        return compare_rows(self.metrics[label], rows, figure, **{"seed": self.settings.get("seed", 0), **options})

    def to_markdown(self) -> str:
        """A table: one row a method; value and interval of each figure, ↑ where more is better and ↓ where less.

        A figure that rests on fewer images than were given says on how many.
        """
        arrows = {True: " ↑", False: " ↓", None: ""}
        columns = [
            (label, figure)
            for label, metric in self.metrics.items()
            for figure in metric.info.figures
            if any(figure.name in self.estimates[method, label] for method in self.methods)
        ]
        alone = {label for label in self.metrics if sum(label == each for each, _ in columns) == 1}
        heads = [
            (label if label in alone or label == figure.name else f"{label} {figure.name}")
            + arrows[figure.higher_is_better]
            for label, figure in columns
        ]
        lines = [["method", *heads], ["---"] * (len(heads) + 1)]
        for method in self.methods:
            found = (self.estimates[method, label].get(figure.name) for label, figure in columns)
            lines.append([method, *("" if each is None else self._cell(each) for each in found)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    @property
    def _images(self) -> int:
        return len(next(iter(self.rows.values()))["broken"])

    def _cell(self, estimate: Estimate) -> str:
        return str(estimate) if estimate.n == self._images else f"{estimate} (n = {estimate.n})"

    _repr_markdown_ = to_markdown

    def __repr__(self) -> str:
        return f"Evaluation of {len(self.methods)} methods on {self._images} images\n{self.to_markdown()}"


def evaluate(
    explainers: Explainer | str | Sequence[Explainer | str] | Mapping[str, Explainer | str],
    images: Images,
    metrics: Metric | str | Sequence[Metric | str],
    *,
    model: nn.Module | ModelAdapter | Subject | LoadedModel | str | None = None,
    target: Target = None,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    masks: Sequence[np.ndarray] | np.ndarray | Tensor | None = None,
    boxes: Sequence[np.ndarray | Tensor] | None = None,
    batch_size: int = 32,
    compiled: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Measures methods on images.

    ::

        found = evaluate(["tokentm", "rollout"], images, ["deletion", "insertion"], model=model)
        print(found)
        found.compare("deletion").ranks

    Args:
        explainers: one or several, on the same model; names of methods where a model is given; by own labels in a
            mapping.
        images: pictures, or normalised input (n, 3, H, W).
        metrics: one or several, configured or by name.
        model: what methods given by name explain.
        target: the class explained: None for the predicted one, a class, or n classes; indices or names.
        labels: n classes that the images show by annotation.
        masks: (n, H, W) in pixels of the model's input: 1 object, 0 background, -1 left out.
        boxes: n arrays (m, 4) of x0, y0, x1, y1 in pixels of the model's input, edges exclusive.
        batch_size: images in one capture.
        compiled: whether metrics that ask the model again ask it compiled by `torch.compile`, which takes a while the
            first time and needs a compiler; meant for GPUs. Figures are the same to rounding.
        confidence: share of intervals that hold the true figure.
        resamples: of the bootstrap.
        seed: number that other bootstrap draws belong to.

    Raises:
        InputError: several models, nothing to measure, or a metric that needs annotations which were not given.
        UnknownNameError: no such method or metric.
        TargetError: a contrast, a function, or several classes an image.
        OptionError: a confidence or a number of resamples that makes no interval, or the model cannot be compiled, and
            is to be.
    """
    check_resampling(confidence, resamples)  # not only when all is measured
    chosen = _explainers(explainers, None if model is None else Subject.of(model))
    listed = [metrics] if isinstance(metrics, Metric | str) else metrics
    configured = [create_metric(each) if isinstance(each, str) else each for each in listed]
    by_label = _labelled("metric", [label_of(each) for each in configured], configured)
    given = {"labels": labels, "masks": masks, "boxes": boxes}
    for metric in by_label.values():
        missing = sorted(part for part in metric.info.requires if part in given and given[part] is None)
        if missing:
            raise InputError(
                f"{metric.info.name} requires {' and '.join(missing)}, which were not given: pass "
                f"{', '.join(f'{part}=…' for part in missing)}, or leave the metric out"
            )
    tallies = {(method, metric): Tally(by_label[metric]) for method in chosen for metric in by_label}
    subject = next(iter(chosen.values())).subject
    batches = metric_batches(
        [each.method for each in chosen.values()],
        subject,
        images,
        target,
        labels=labels,
        masks=masks,
        boxes=boxes,
        batch_size=batch_size,
        compiled=compiled,
    )
    for label, (_, batch) in zip(cycle(chosen), batches, strict=False):
        for name in by_label:
            tallies[label, name].update(batch)
    return Evaluation(
        by_label,
        {key: tally.rows for key, tally in tallies.items()},
        {"confidence": confidence, "resamples": resamples, "seed": seed},
    )


def label_of(configured: Configurable) -> str:
    """The name of a method or metric, with the options that are not the usual ones."""
    usual = {each.name: each.default for each in fields(configured)}
    options = ", ".join(f"{name}={value}" for name, value in configured.options.items() if value != usual[name])
    return f"{configured.info.name}({options})" if options else str(configured.info.name)


def _explainers(
    given: Explainer | str | Sequence[Explainer | str] | Mapping[str, Explainer | str], subject: Subject | None
) -> dict[str, Explainer]:
    """Explainers of one model by label.

    Raises:
        InputError: none, two of one label, a name without a model, or several models.
    """

    def explainer(each: Explainer | str) -> Explainer:
        if isinstance(each, Explainer):
            return each
        if subject is None:
            raise InputError(
                f"found the method {each!r} by name and no model to explain: pass model=…, or an Explainer"
            )
        return get_explainer(each, subject)

    listed = [given] if isinstance(given, Explainer | str) else given
    chosen = [explainer(each) for each in (listed.values() if isinstance(listed, Mapping) else listed)]
    if len({id(each.subject.adapter.model) for each in chosen}) > 1:
        raise InputError("found explainers of several models, expected one: evaluate each model by itself")
    labels = list(listed) if isinstance(listed, Mapping) else [label_of(each.method) for each in chosen]
    return _labelled("method", labels, chosen)


def _labelled(kind: str, labels: Sequence[str], things: Sequence[_Thing]) -> dict[str, _Thing]:
    """Things by label.

    Raises:
        InputError: there are none, or two have the same label.
    """
    if not things or len(set(labels)) < len(labels):
        raise InputError(f"found {kind}s {list(labels)}, expected at least one, and each once")
    return dict(zip(labels, things, strict=True))
