"""Masks that nobody drew: guesses by a model at where the object is, for images that have labels alone.

Maps trained on them are as good as the guesses; measure these on a few true masks first. The class scores of a model's
own patches are no source where the model was trained on its CLS token (see the method `pm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..attention import AttentionOperands
from ..capture import Capture
from ..data.example import Example
from ..errors import InputError, UnsupportedModelError
from ..explainer import Explainer
from ..images import load_image
from ..models import adapt
from ..models.adapter import ModelAdapter
from ..needs import Needs
from ..patch_pixels import Extent, at_pixels, scaled_extent
from ..preprocessing import Preprocessing
from ..registry import create_method
from ..subject import Subject

SPECTRAL_CUT = "spectral_cut"
"""The source that cuts the graph of last-block keys in two; every other source is the name of a method."""

_UNLIKE = 1e-5


def with_pseudo_masks(
    examples: Sequence[Example],
    model: nn.Module | ModelAdapter,
    preprocessing: Preprocessing,
    source: str = SPECTRAL_CUT,
    *,
    deviations: float = 0.5,
    batch_size: int = 32,
) -> list[Example]:
    """Examples with guessed masks in place of their own, as annotated examples for `train_patch_masks`.

    Their pictures are held in memory, as the model sees them.

    Args:
        examples: with labels.
        model: what guesses; not necessarily the model to be trained.
        preprocessing: how pictures become its input.
        source: ``"spectral_cut"``, or a method whose map of the first label is thresholded, such as ``"rollout"``.
        deviations: a map's threshold, in standard deviations of its scores above their mean.
        batch_size: images in a forward pass.

    Raises:
        InputError: there are no examples, or one has no label.
        UnsupportedModelError: the model does not have what the source reads.
    """
    if not len(examples):
        raise InputError("found no examples to guess masks for, expected at least one")
    subject, made = Subject(adapt(model), preprocessing), []
    for start in range(0, len(examples), batch_size):
        batch = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        views = [preprocessing.view(load_image(example.image)) for example in batch]
        inputs = preprocessing.replace(crop_fraction=1.0)(views)
        if source == SPECTRAL_CUT:
            masks = spectral_masks(subject.adapter, inputs)
        else:
            labels = [_label(example) for example in batch]
            explained = Explainer(create_method(source), subject)(inputs, labels)
            masks = thresholded(explained.scores, deviations)
        size, grid = (inputs.shape[-2], inputs.shape[-1]), (masks.shape[-2], masks.shape[-1])
        extent = subject.adapter.extent(size, grid)
        for example, view, mask in zip(batch, views, masks, strict=True):
            made.append(_masked(example, view, mask, scaled_extent(extent, size, (view.height, view.width))))
    return made


def thresholded(scores: Tensor, deviations: float = 0.5) -> Tensor:
    """Patches whose score is so many standard deviations above the mean of their map: (B, h, w) to bool (B, h, w)."""
    mean, deviation = scores.mean((1, 2), keepdim=True), scores.std((1, 2), correction=0, keepdim=True)
    return scores > mean + deviations * deviation


def spectral_masks(model: nn.Module | ModelAdapter, inputs: Tensor, *, least_similar: float = 0.2) -> Tensor:
    """The object of each image by a normalised cut of its patches, which asks for no class.

    Patches are a graph; two are joined (weight 1) where the cosine of their last-block keys, all heads side by side, is
    above a threshold, and hardly joined (1e-5) elsewhere. The eigenvector of the second smallest eigenvalue of
    (D - E) y = λ D y is cut at its mean; the object is the side on which its largest magnitude lies, and of that the
    connected part (by edges) that holds it.

    Source: Wang et al., TokenCut, CVPR 2022, section 3. Self-supervised models give better keys than classifiers.

    Args:
        model: whose keys are read.
        inputs: (B, channels, H, W), normalised.
        least_similar: the threshold.

    Returns:
        (B, h, w) bool on the CPU.

    Raises:
        UnsupportedModelError: the last block shows no keys for all patches.
    """
    with Capture(adapt(model), Needs(attention=True, from_block=-1)) as capture, torch.no_grad():
        capture.forward(inputs)
        keys = _keys(capture)
    layout = capture.layouts[-1]
    features = F.normalize(keys[:, layout.prefix :].double().cpu(), dim=2)
    similar = features @ features.transpose(1, 2) > least_similar
    edges = torch.where(similar, 1.0, _UNLIKE).to(torch.float64)
    root = edges.sum(2).rsqrt()
    laplacian = torch.eye(edges.shape[1], dtype=torch.float64) - root[:, :, None] * edges * root[:, None, :]
    second = torch.linalg.eigh(laplacian).eigenvectors[:, :, 1] * root
    return torch.stack([_object_side(vector.view(layout.grid)) for vector in second])


def _keys(capture: Capture) -> Tensor:
    """Keys of the last block (B, N, D), heads side by side."""
    operands = capture.blocks[-1].operands
    if not isinstance(operands, AttentionOperands) or operands.num_keys != capture.layouts[-1].count:
        raise UnsupportedModelError(
            f"the last block of a {type(capture.adapter.model).__name__} shows no keys of all its patches; take a "
            "method as the source, such as rollout, or another model to guess"
        )
    return operands.k.transpose(1, 2).flatten(2)


def _object_side(vector: Tensor) -> Tensor:
    side, seed = vector > vector.mean(), int(vector.abs().argmax())
    if not side.flatten()[seed]:
        side = ~side
    _, parts = cv2.connectedComponents(side.numpy().astype(np.uint8), connectivity=4)
    return torch.from_numpy(parts == parts.flatten()[seed])


def _masked(example: Example, view: Image.Image, mask: Tensor, extent: Extent | None) -> Example:
    size = (view.height, view.width)
    drawn: npt.NDArray[np.int8] = at_pixels(mask, size, extent).cpu().numpy().astype(np.int8)
    return replace(example, image=view, mask=drawn, boxes=None, size=size)


def _label(example: Example) -> int:
    if not example.labels:
        raise InputError(f"{example.name!r} has no label; expected one, since the map of a class is thresholded")
    return example.labels[0]
