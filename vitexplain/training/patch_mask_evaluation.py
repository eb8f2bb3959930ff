"""How well a model names images and patches: accuracy, and how well maps of the labelled class separate its object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import ExampleBatch, load_examples
from ..data.example import Example
from ..errors import InputError
from ..explainer import Explainer
from ..metrics import MetricBatch, Tally, create_metric
from ..models import adapt
from ..models.adapter import ModelAdapter
from ..preprocessing import Preprocessing
from ..registry import create_method
from ..subject import Subject

_FEW = 3  # of many names, how many an error lists


@dataclass(frozen=True)
class PatchMaskFigures:
    """Figures over images with masks.

    Attributes:
        accuracy: share of images whose label the model predicts.
        pixel_average_precision: area under precision and recall of the pixels of all maps, of the labelled class.
        chance: what a flat map gets there: the objects' share of all pixels.
        images: how many could be read; each figure rests on all of them.
    """

    accuracy: float
    pixel_average_precision: float
    chance: float
    images: int


def evaluate_patch_masks(
    model: nn.Module | ModelAdapter,
    examples: Sequence[Example],
    preprocessing: Preprocessing,
    *,
    score: str = "probability",
    batch_size: int = 32,
) -> PatchMaskFigures:
    """Measures the maps of the method `pm` on a model.

    Args:
        model: the model; it is borrowed.
        examples: with labels and masks.
        preprocessing: how pictures become the model's input.
        score: the option of `pm`.
        batch_size: images in a forward pass.

    Raises:
        InputError: an example lacks its label or its mask, or the mask leaves out all that the model sees; or none can
            be read.
    """
    explainer = Explainer(create_method("pm", score=score), Subject(adapt(model), preprocessing))
    tally, right = Tally(create_metric("pixel_average_precision")), 0
    for batch in load_examples(examples, preprocessing, batch_size=batch_size):
        masks = _checked_masks(batch)
        classes = torch.tensor([labels[0] for labels in batch.labels])
        explanation = explainer(batch.inputs, classes)
        tally.update(MetricBatch(explanation.scores.cpu(), masks=masks, extent=explanation.extent))
        right += sum(
            found in labels for found, labels in zip(explanation.logits.argmax(1).tolist(), batch.labels, strict=True)
        )
    summary = tally.compute()
    area, chance = (summary.figures[name] for name in ("pixel_average_precision", "chance"))
    return PatchMaskFigures(right / summary.images, area, chance, summary.images)


def _checked_masks(batch: ExampleBatch) -> Tensor:
    """The masks (B, H, W) of a batch in which every image can be measured."""
    masks = torch.full((len(batch), 1, 1), -1) if batch.masks is None else batch.masks
    masked = (masks >= 0).flatten(1).any(1).tolist()
    for what, there in (("label", batch.labels), ("mask of what the model sees", masked)):
        lacking = [name for name, found in zip(batch.names, there, strict=True) if not found]
        if lacking:
            raise InputError(
                f"found no {what} of {', '.join(map(repr, lacking[:_FEW]))}{', …' if len(lacking) > _FEW else ''}; "
                "expected one of each image that is measured: add it, or leave the image out"
            )
    return masks
