"""What a model says of images some of whose pixels were replaced; the base of metrics that ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import TargetError
from ..options import option
from .metric import Metric, MetricBatch
from .ordering import ORDERS, Ranking, rank_pixels
from .predictor import Predictor
from .replacement import REPLACEMENTS, replacement_images


@dataclass(frozen=True, eq=False)
class Responses:
    """A model's output as far as these metrics look at it; the leading axes are those of what was asked.

    Attributes:
        log_probability: (B,) or (B, S) float64, natural logarithm of the softmax at the class that is followed.
        predicted: (B,) or (B, S) int64, the class with the largest logit.
    """

    log_probability: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, logits: Tensor, classes: Tensor | None = None) -> Responses:
        """Reads logits (n, C) at the classes (n,); without these, at the predicted ones.

        Raises:
            TargetError: the model has no such class.
        """
        predicted = logits.argmax(1)
        classes = predicted if classes is None else checked_classes(classes, logits)
        return cls(logits.double().log_softmax(1).gather(1, classes[:, None])[:, 0], predicted)

    @property
    def probability(self) -> Tensor:
        """The softmax at the class that is followed, in [0, 1], float64."""
        return self.log_probability.exp()


def checked_classes(classes: Tensor, logits: Tensor) -> Tensor:
    """Classes (n,) of a model with these logits (n, C), int64 on their device.

    Raises:
        TargetError: the model has no such class.
    """
    lowest, highest, count = int(classes.amin()), int(classes.amax()), logits.shape[1]
    if lowest < 0 or highest >= count:
        raise TargetError(
            f"found classes from {lowest} to {highest}, expected 0 to {count - 1} for a model of {count} classes"
        )
    return classes.to(logits.device, torch.int64)


@dataclass(frozen=True)
class PixelMetric(Metric):
    """Base of metrics that replace pixels in the order of the map and ask the model again."""

    order: str = option(
        "bilinear",
        "what is ranked: pixels of the bilinear or of the nearest map, or whole patches; equal ones row by row",
        choices=ORDERS,
    )
    replacement: str = option("black", "what replaces the pixels that are taken away", choices=REPLACEMENTS)
    seed: int = option(0, "seed of the noise, where the replacement is noise", minimum=0, maximum=2**32 - 1)

    def respond(
        self,
        batch: MetricBatch,
        ranking: Ranking,
        intervals: Sequence[tuple[int, int]],
        classes: Tensor,
    ) -> Responses:
        """What the model says, (B, S), of images whose pixels of rank low <= rank < high are replaced.

        Args:
            batch: has inputs and a predictor.
            ranking: of the same images.
            intervals: S pairs (low, high).
            classes: (B,) followed.

        Raises:
            InputError: the inputs are not what the model takes, or the replacement cannot be painted.
            TargetError: the model has no such class.
        """
        predictor = cast("Predictor", batch.predictor)
        inputs = predictor.adapter.check_images(cast("Tensor", batch.inputs))
        replaced = replacement_images(self.replacement, inputs, predictor, self.seed)
        return respond(predictor, inputs, replaced, ranking, intervals, classes)

    def ranking(self, batch: MetricBatch, *, most_relevant_first: bool = True) -> Ranking:
        """The order in which the batch's pixels are replaced."""
        return rank_pixels(
            batch.scores,
            input_size(batch),
            self.order,
            most_relevant_first=most_relevant_first,
            extent=batch.extent,
        )


def input_size(batch: MetricBatch) -> tuple[int, int]:
    """Pixels (H, W) of a batch's inputs."""
    height, width = cast("Tensor", batch.inputs).shape[-2:]
    return height, width


def clean_responses(batch: MetricBatch, classes: Tensor | None = None) -> Responses:
    """What the model says, (B,), of the unchanged images, at these classes or the predicted ones.

    Raises:
        InputError: the inputs are not what the model takes.
        TargetError: the model has no such class.
    """
    # the batch's own tensor: a predictor may know its logits already
    return Responses.of(cast("Predictor", batch.predictor).logits(cast("Tensor", batch.inputs)), classes)


def respond(
    predictor: Predictor,
    inputs: Tensor,
    replaced: Tensor,
    ranking: Ranking,
    intervals: Sequence[tuple[int, int]],
    classes: Tensor,
) -> Responses:
    """Asks the model about B·S changed images, in full batches that are made in one buffer.

    Memory does not grow with B·S beyond the numbers kept: one batch of images is alive at a time.

    Args:
        predictor: asked as many images at a time as pay, whatever images and steps they come from.
        inputs: (B, 3, H, W), normalised.
        replaced: (B, 3, H, W), taken where a pixel is replaced.
        ranking: of B maps.
        intervals: S pairs; image and pair give one changed image, with low <= rank < high replaced.
        classes: (B,) followed.
    """
    ranks, classes = ranking.ranks.to(inputs.device), classes.to(inputs.device)
    total = len(inputs) * len(intervals)
    buffer = inputs.new_empty(min(predictor.part_of(total, inputs), total), *inputs.shape[1:])
    parts = []
    for start in range(0, total, len(buffer)):
        numbers = range(start, min(start + len(buffer), total))
        for place, number in zip(buffer, numbers, strict=False):
            image, step = divmod(number, len(intervals))
            low, high = intervals[step]
            inside = (ranks[image] >= low) & (ranks[image] < high)
            torch.where(inside, replaced[image], inputs[image], out=place)
        logits = predictor.logits(buffer[: len(numbers)])
        images = torch.tensor(numbers, device=inputs.device) // len(intervals)
        parts.append(Responses.of(logits, classes[images]))
    shape = (len(inputs), len(intervals))
    return Responses(
        torch.cat([part.log_probability for part in parts]).reshape(shape),
        torch.cat([part.predicted for part in parts]).reshape(shape),
    )
