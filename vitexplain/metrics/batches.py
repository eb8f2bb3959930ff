"""Metric batches of several methods on the same images: one capture and one clean forward serve them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ExplanationWarning, InputError, OptionError, TargetError
from ..explainer import explain_with
from ..explanation import Explanation
from ..method import Method
from ..subject import Subject
from ..targets import Target, check_length, select_target
from .metric import MetricBatch
from .objects import checked_masks
from .predictor import Predictor

if TYPE_CHECKING:
    from ..subject import Images


@dataclass(frozen=True, eq=False)
class InformedPredictor(Predictor):
    """A predictor that has seen one batch already.

    Attributes:
        inputs: (B, 3, H, W), recognised as this very tensor.
        clean: (B, C), its logits.
    """

    inputs: Tensor | None = None
    clean: Tensor | None = None

    def logits(self, inputs: Tensor) -> Tensor:
        """As of `Predictor`, at no cost for the batch that is known."""
        if self.clean is not None and inputs is self.inputs:
            return self.clean
        return super().logits(inputs)


@dataclass(frozen=True, eq=False)
class Annotations:
    """What is known of n images besides themselves, in pixels of the model's input; see `MetricBatch`.

    Attributes:
        labels: (n,) int64.
        masks: (n, H, W) int8.
        boxes: n tensors (m, 4).
    """

    labels: Tensor | None = None
    masks: Tensor | None = None
    boxes: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, images: int, labels: Any = None, masks: Any = None, boxes: Any = None) -> Annotations:
        """From lists, arrays or tensors.

        Raises:
            InputError: not one an image, no numbers, labels that are no whole ones, or masks of several sizes or other
                values than 1, 0 and -1.
        """
        for name, value in (("labels", labels), ("masks", masks), ("boxes", boxes)):
            if value is None:
                continue
            try:
                count = len(value)
            except TypeError as error:
                message = f"found {value!r} as {name} of {images} images, expected a list of one an image"
                raise InputError(message) from error
            if count != images:
                raise InputError(f"found {count} {name} for {images} images, expected one an image")
        return cls(
            None if labels is None else _labels(_numbers("labels", labels)),
            None if masks is None else _stacked([_numbers("the mask of an image", each) for each in masks]),
            None if boxes is None else [_boxes(_numbers("the boxes of an image", each)) for each in boxes],
        )

    def part(self, rows: slice, device: torch.device) -> dict[str, Any]:
        """Those of some images, as a `MetricBatch` takes them."""
        return {
            "labels": None if self.labels is None else self.labels[rows].to(device),
            "masks": None if self.masks is None else self.masks[rows].to(device),
            "boxes": None if self.boxes is None else [each.to(device) for each in self.boxes[rows]],
        }


def metric_batches(
    methods: Sequence[Method],
    subject: Subject,
    images: Images,
    target: Target = None,
    *,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    masks: Sequence[np.ndarray] | np.ndarray | Tensor | None = None,
    boxes: Sequence[np.ndarray | Tensor] | None = None,
    batch_size: int = 32,
    forward_size: int = 64,
    compiled: bool = False,
) -> Iterator[tuple[Method, MetricBatch]]:
    """Explains images and hands out what metrics look at, batch by batch and in each batch method by method.

    Maps that are constant or broken are counted by `measure`, so that no warning is given here.

    Args:
        methods: configured methods.
        subject: the model.
        images: pictures, or normalised input (n, 3, H, W).
        target: the class explained: None for the predicted one, a class, or n classes; indices or names.
        labels: n classes that the images show by annotation.
        masks: (n, H, W) in pixels of the model's input: 1 object, 0 background, -1 left out.
        boxes: n arrays (m, 4) of x0, y0, x1, y1 in pixels of the model's input, edges exclusive.
        batch_size: images in one capture; halved where memory does not suffice.
        forward_size: images in one forward of the batches' predictor.
        compiled: whether that forward is compiled; see `Predictor`.

    Raises:
        InputError: no images, annotations of another number than these or that are no numbers, a label that is no class
            of the model, or masks of other values or several sizes.
        TargetError: a contrast, a function, or several classes an image.
        OptionError: a batch size below 1.
    """
    if min(batch_size, forward_size) < 1:
        raise OptionError(f"found batch_size={batch_size}, forward_size={forward_size}, expected whole numbers >= 1")
    listed: Any = images if isinstance(images, Tensor | list | tuple) else [images]
    listed = listed[None] if isinstance(listed, Tensor) and listed.ndim == 3 else listed
    target = one_class(target, len(listed))
    if not len(listed):
        raise InputError("found no images, expected at least one")
    known = Annotations.of(len(listed), labels, masks, boxes)
    for start in range(0, len(listed), batch_size):
        rows = slice(start, start + batch_size)
        explanations = explain_quietly(methods, subject, listed[rows], select_target(target, rows))
        inputs, logits, targets = explanations[0].inputs, explanations[0].logits.float(), explanations[0].targets
        predictor = InformedPredictor(
            subject.adapter, subject.preprocessing, forward_size, inputs, logits, compiled=compiled
        )
        annotations = known.part(rows, logits.device)
        _check_labels(annotations["labels"], logits.shape[1])
        for method, explanation in zip(methods, explanations, strict=True):
            explain = explaining(method, subject, batch_size)
            yield (
                method,
                MetricBatch(
                    explanation.scores,
                    targets,
                    inputs,
                    predictor,
                    explain=explain,
                    extent=explanation.extent,
                    **annotations,
                ),
            )


def explaining(method: Method, subject: Subject, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of inputs (b, 3, H, W) and targets (b,) to scores (b, h, w)."""

    def explain(inputs: Tensor, targets: Tensor) -> Tensor:
        return explain_quietly([method], subject, inputs, targets, batch_size)[0].scores

    return explain


def explain_quietly(
    methods: Sequence[Method], subject: Subject, images: Images, target: Target, batch_size: int | None = None
) -> list[Explanation]:
    """`explain_with`, without warnings of constant and broken maps: what measures maps counts them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        return explain_with(methods, subject, images, target, batch_size=batch_size)


def one_class(target: Target, images: int) -> Target:
    """The target, if it names no more than one class an image.

    Raises:
        TargetError: it does, or has another length.
    """
    if isinstance(target, Sequence) and not isinstance(target, tuple | str):
        target = list(target)  # type: ignore[assignment]
    if target is None or (not isinstance(target, tuple) and not callable(target) and np.ndim(target) < 2):
        check_length(target, images)
        return target
    raise TargetError("metrics measure one map an image; expected None (the predicted class), a class, or one an image")


def _numbers(what: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"found {given!r:.80} as {what}, expected numbers: an array, a tensor or a list. Of an image about which "
            "nothing is known, the boxes are an empty list, and the mask is -1 everywhere"
        ) from error


def _labels(labels: Tensor) -> Tensor:
    whole = labels.to(torch.int64)
    if labels.ndim != 1 or not torch.equal(whole.to(labels.dtype), labels):
        raise InputError(
            f"found labels of shape {tuple(labels.shape)} and {labels.dtype}, expected (n,) whole numbers: the index "
            "of one class an image"
        )
    return whole


def _boxes(boxes: Tensor) -> Tensor:
    """Boxes as float64; an empty list is none of them, and has no second axis."""
    return boxes.double() if boxes.numel() else torch.zeros(0, 4).double()


def _stacked(masks: list[Tensor]) -> Tensor:
    sizes = sorted({tuple(each.shape) for each in masks})
    if len(sizes) > 1:
        raise InputError(
            f"found masks of {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}, expected all of the model's input: "
            "resize masks as the images were, to the nearest pixel"
        )
    return checked_masks(torch.stack(masks))


def _check_labels(labels: Tensor | None, classes: int) -> None:
    if labels is not None and bool(((labels < 0) | (labels >= classes)).any()):
        raise InputError(
            f"found labels from {int(labels.min())} to {int(labels.max())}, expected 0 to {classes - 1}: the model has "
            f"{classes} classes"
        )
