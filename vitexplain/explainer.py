"""`Explainer`: check the input, capture, attribute, hand out an `Explanation`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import torch
from torch import Tensor

from .errors import ExplanationWarning, InputError, OptionError, TargetError, is_out_of_memory
from .explanation import Explanation
from .method import Method
from .registry import create_method
from .shared_capture import Attributed, attribute_together
from .subject import Subject
from .targets import Target, check_length, named_classes, select_target

if TYPE_CHECKING:
    from .subject import Images, Model


class Explainer:
    """One method on one model: ``explainer(images, target)`` gives an `Explanation`.

    Args:
        method: the configured method, or its name.
        model: what `Subject.of` takes.
    """

    def __init__(self, method: Method | str, model: Model) -> None:
        self.method = _configured(method)
        self.subject = Subject.of(model)
        self.subject.adapter.check_needs(self.method.needs)

    def __repr__(self) -> str:
        return f"Explainer({self.method!r}, {type(self.subject.adapter.model).__name__})"

    def __call__(self, images: Images, target: Target = None, *, batch_size: int | None = None) -> Explanation:
        """Explains a batch.

        Args:
            images: (B, 3, H, W) normalised tensor, one image (3, H, W), or a list of such images; or a file, a PIL
                image or a uint8 array (H, W, 3), or a list of these, where the model's preprocessing is known.
            target: what is explained: None (predicted class), an int, B indices, B×K indices (K maps from one
                forward), a pair ``(a, b)`` for class a against b, or a function of the logits (B, C) → (B,). Names
                of classes will do for indices where the subject has labels.
            batch_size: images at a time; by default as many as pay: all on an accelerator, on the CPU about a
                mebipixel of them. Halved where memory does not suffice.

        Raises:
            VitExplainError: in one of its kinds; the model is as it was before in any case.
        """
        return explain_with([self.method], self.subject, images, target, batch_size=batch_size)[0]

    def fit(
        self,
        images: Iterable[Any],
        output: str | os.PathLike[str],
        *,
        validation: Iterable[Any] | None = None,
        **settings: Any,
    ) -> Explainer:
        """Trains a method that learns, on this model, and explains with what was learnt from then on.

        Args:
            images: batches of normalised images (B, 3, H, W), or tuples that begin with them, such as a
                `torch.utils.data.DataLoader` gives.
            output: checkpoint file to write.
            validation: batches by which the best result is chosen; what that is by default, the method's `fit` says.
            **settings: of the training, see the method's `fit`.

        Raises:
            OptionError: the method needs no training.
        """
        self.method = self.method.fit(self.subject.adapter, images, output, validation=validation, **settings)
        return self

    @overload
    def attribute(self, inputs: Tensor, target: Target = None) -> Tensor: ...

    @overload
    def attribute(self, inputs: tuple[Tensor], target: Target = None) -> tuple[Tensor]: ...

    def attribute(self, inputs: Tensor | tuple[Tensor], target: Target = None) -> Tensor | tuple[Tensor]:
        """The same map in the shape captum and Quantus take: upsampled to the input, repeated over its channels.

        Args:
            inputs: (B, 3, H, W), or one image (3, H, W), normalised; or a tuple of that one tensor, as captum's metrics
                pass it on.
            target: one target an image, as for a call.

        Returns:
            (B, 3, H, W) raw scores, bilinear between patch centres; in a tuple where the inputs were.

        Raises:
            TargetError: several targets an image.
        """
        from .render import upsample

        if isinstance(inputs, tuple):
            return (self.attribute(inputs[0], target),)
        explanation = self(inputs, target)
        scores = explanation.scores
        if scores.ndim != 3:
            raise TargetError(f"found {scores.shape[1]} targets an image, expected one: attribute gives one map")
        channels, *size = inputs.shape[-3:]
        maps = upsample(scores, (size[0], size[1]), "bilinear", explanation.extent_in(size))
        return maps[:, None].repeat(1, channels, 1, 1)


def explain_with(
    methods: Sequence[Method | str],
    subject: Model,
    images: Images,
    target: Target = None,
    *,
    batch_size: int | None = None,
) -> list[Explanation]:
    """Several methods on the same images: one capture serves all that follow the same gradient.

    One forward and one backward a target, whatever the number of methods, for `batch_size` images at a time or as many
    as pay; balanced gradients, and each kind of relevance propagation, take as many beside the plain ones. Methods are
    configured ones or names, the subject what `Subject.of` takes; the other arguments and errors are those of
    `Explainer.__call__`.

    Returns:
        One explanation a method, in their order.
    """
    if not methods:
        raise OptionError("found no methods, expected at least one")
    configured = [_configured(each) for each in ([methods] if isinstance(methods, str | Method) else methods)]
    subject = Subject.of(subject)
    for method in configured:
        subject.adapter.check_needs(method.needs)
    if isinstance(target, Sequence) and not isinstance(target, list | tuple | str):
        target = cast("Target", list(target))
    elif hasattr(target, "__array__") and not isinstance(target, Tensor):  # a column of a table, say
        target = np.array(target)
    target = named_classes(target, subject.labels)
    inputs = subject.prepare(images)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise OptionError(f"found batch_size={batch_size}, expected a whole number >= 1 or None")
    check_length(target, len(inputs))
    step, start, at_once = min(batch_size or len(inputs), len(inputs)), 0, batch_size is not None
    parts: list[list[Explanation]] = []
    while start < len(inputs) or not parts:
        rows = slice(start, start + step)
        try:
            parts.append(_explain_batch(configured, subject, inputs[rows], select_target(target, rows), start, at_once))
        except RuntimeError as error:
            if step <= 1 or not is_out_of_memory(error):
                raise
            step //= 2
        else:
            start += step
    return [Explanation.concatenate(list(of_method)) for of_method in zip(*parts, strict=True)]


def _configured(method: Method | str) -> Method:
    return method if isinstance(method, Method) else create_method(method)


def _explain_batch(
    methods: Sequence[Method], subject: Subject, inputs: Tensor, target: Target, start: int, at_once: bool
) -> list[Explanation]:
    """Explains one batch, whose first image is number `start` of all."""
    with torch.inference_mode(False):  # what a caller's makes could take part in no graph
        attributed = attribute_together(methods, subject.adapter, inputs, target, at_once=at_once)
        _check_labels(subject.labels, attributed.logits.shape[1])
        return [
            _explanation(method, subject, attributed, scores, shares, start)
            for method, (scores, shares) in zip(methods, attributed.maps, strict=True)
        ]


def _check_labels(labels: Sequence[str] | None, outputs: int) -> None:
    """Refuses labels of another number than the model has outputs: names would stand beside other classes."""
    if labels is not None and len(labels) != outputs:
        raise InputError(
            f"found {len(labels)} labels, expected {outputs}, one for each output of the model, in their order: pass "
            "so many, or None"
        )


def _explanation(
    method: Method, subject: Subject, attributed: Attributed, scores: Tensor, shares: Tensor, start: int
) -> Explanation:
    flat = scores.flatten(2)
    constant = flat.amax(2) == flat.amin(2)
    if not flat.isfinite().all():
        broken = _images(~flat.isfinite().all(2), start)
        _warn(
            f"{method.info.name} gave NaN or infinite scores for images {broken}: check the weights and the precision"
        )
    elif constant.any() and flat.shape[2] > 1:
        cause = (
            "nothing in the patches speaks for the target: its gradient is zero, or all evidence negative and clipped"
            if method.needs.gradient
            else "attention does not tell the patches apart"
        )
        _warn(f"{method.info.name} gave a constant map for images {_images(constant, start)}: {cause}")
    target, images = attributed.target, attributed.images
    if target.single:
        scores, shares, constant = scores[:, 0], shares[:, 0], constant[:, 0]
    options: dict[str, Any] = method.options
    grid, size = (scores.shape[-2], scores.shape[-1]), (images.shape[-2], images.shape[-1])
    return Explanation(
        scores=scores,
        targets=target.explained_classes(),
        against=target.opposed_classes(),
        logits=attributed.logits,
        method=method.info.name,
        options=options,
        grid=grid,
        image_size=size,
        signed=method.signed,
        approximate=subject.adapter.approximate if method.follows_blocks else None,
        diagnostics={"prefix_share": shares, "constant": constant},
        preprocessing=subject.preprocessing,
        labels=subject.labels,
        inputs=images,
        extent=subject.adapter.extent(size, grid),
    )


def _images(found: Tensor, start: int) -> list[int]:
    """Which images have a True in (B, K), counted over all batches."""
    return [start + index for index, row in enumerate(found.tolist()) if any(row)]


def _warn(message: str) -> None:
    """Warns at the line that called into the package, whichever door it came through."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ExplanationWarning, stacklevel=level)
