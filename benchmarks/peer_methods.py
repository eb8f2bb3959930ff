"""Methods of other packages, each beside the method here that does the same.

Each side is a function of one subject, so that both see the same model, images and classes; what turns their outputs
into comparable rows is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitexplain import Explainer, create_method
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.patch_pixels import gather_by_patch
from vitexplain.render import upsample

from .measuring import Run
from .metric_cost import QUANTUS_STEPS, pixel_flipping
from .naive_recipes import RECIPES
from .peer_libraries import (
    Prepare,
    Subject,
    captum_layer_grad_cam,
    captum_occlusion,
    captum_pixels,
    grad_cam,
    lxt_attnlrp,
    torchcam_legrad,
)

STEPS = 10
"""Steps of integrated gradients, on both sides."""

Rows = Callable[[Any, Subject], Tensor]
"""Makes comparable rows (B, M) of what a run gives; or (2, B, M), of which each image takes the more alike."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A method of another package and the method here that computes the same.

    Attributes:
        ours: the method here, by its registry name and what of its options is not the default.
        peer: the other one, with its package.
        run_ours: prepares the one.
        run_peer: prepares the other.
        ours_rows: rows of the one's output.
        peer_rows: rows of the other's.
    """

    ours: str
    peer: str
    run_ours: Prepare
    run_peer: Prepare
    ours_rows: Rows
    peer_rows: Rows


def ours(name: str, **options: Any) -> Prepare:
    """A method of the registry."""

    def prepare(subject: Subject) -> Run:
        explainer = Explainer(create_method(name, **options), subject.model)
        return lambda: explainer(subject.images, subject.classes)

    return prepare


def scores(explanation: Any, _: Subject) -> Tensor:
    """The patch scores (B, P) of an explanation."""
    found: Tensor = explanation.scores
    return found.flatten(1)


def enlarged(explanation: Any, subject: Subject) -> Tensor:
    """The scores (B, H·W) at every pixel, bilinear between patch centres."""
    return upsample(explanation.scores, subject.image_size, "bilinear").flatten(1)


def enlarged_either_way(explanation: Any, subject: Subject) -> Tensor:
    """The positive part of signed scores, and that of their opposite (2, B, H·W), for a peer with signs by chance."""
    sides = torch.stack([explanation.scores, -explanation.scores]).clamp(min=0)
    return torch.stack([upsample(each, subject.image_size, "bilinear").flatten(1) for each in sides])


def flat(output: Any, _: Subject) -> Tensor:
    """An array or tensor (B, …) as (B, M)."""
    return torch.as_tensor(output).detach().flatten(1).float()


def patch_sums(output: Tensor, subject: Subject) -> Tensor:
    """Pixels (B, 3, H, W), summed over channels and patches."""
    return gather_by_patch(output.detach().sum(1), subject.grid, mean=False).flatten(1)


def patch_means(output: Tensor, subject: Subject) -> Tensor:
    """Pixels (B, 3, H, W), averaged over channels and patches."""
    return gather_by_patch(output.detach().mean(1), subject.grid, mean=True).flatten(1)


def _made_up(subject: Subject) -> MetricBatch:
    maps = torch.rand(len(subject.images), *subject.grid, generator=torch.Generator().manual_seed(1))
    predictor = Predictor.of(subject.model)
    return MetricBatch(maps, targets=subject.classes, inputs=subject.images, predictor=predictor)


def our_deletion(subject: Subject) -> Run:
    """Deletion in the steps of `quantus_flipping`, on made-up maps."""
    batch = _made_up(subject)
    metric = create_metric("deletion", steps=QUANTUS_STEPS, order="nearest")
    return lambda: metric.measure(batch)


def quantus_flipping(subject: Subject) -> Run:
    """Quantus' pixel flipping on the same maps."""
    return pixel_flipping(subject.model, _made_up(subject))


def naive(name: str) -> Prepare:
    """One of `naive_recipes.RECIPES`."""
    return lambda subject: lambda: RECIPES[name](subject.model, subject.images, subject.classes)


def _cam(name: str, method: str, **options: Any) -> Pair:
    return Pair(method, f"pytorch-grad-cam {name}", ours(method, **options), grad_cam(name), enlarged, flat)


def _eigen_cam() -> Pair:
    method, name = ours("eigencam", relu=False), "EigenCAM"
    return Pair("eigencam", f"pytorch-grad-cam {name}", method, grad_cam(name), enlarged_either_way, flat)


PAIRS: dict[str, Pair] = {
    "gradcam": _cam("GradCAM", "gradcam"),
    "hirescam": _cam("HiResCAM", "hirescam"),
    "layercam": _cam("LayerCAM", "layercam"),
    "eigencam": _eigen_cam(),
    "saliency": Pair("saliency", "captum Saliency", ours("saliency"), captum_pixels("Saliency"), scores, patch_means),
    "integrated_gradients": Pair(
        f"integrated_gradients, {STEPS} steps",
        f"captum IntegratedGradients, {STEPS} steps",
        ours("integrated_gradients", steps=STEPS),
        captum_pixels("IntegratedGradients", n_steps=STEPS),
        scores,
        patch_sums,
    ),
    "layer_gradcam": Pair("gradcam", "captum LayerGradCam", ours("gradcam"), captum_layer_grad_cam, scores, flat),
    "occlusion": Pair("occlusion", "captum Occlusion", ours("occlusion"), captum_occlusion, scores, patch_means),
    "legrad": Pair(
        "legrad, 4 layers", "torch-cam LeGrad, 4 layers", ours("legrad", layers=4), torchcam_legrad(4), scores, flat
    ),
    "attnlrp": Pair(
        "attnlrp, attention constant",
        "lxt AttnLRP",
        ours("attnlrp", attention="constant", epsilon=0.0),
        lxt_attnlrp,
        scores,
        patch_sums,
    ),
    "deletion": Pair(
        f"deletion, {QUANTUS_STEPS} steps",
        f"Quantus PixelFlipping, {QUANTUS_STEPS} steps",
        our_deletion,
        quantus_flipping,
        lambda output, _: output["probability"][:, 1:],
        lambda output, _: torch.stack([torch.as_tensor(each).flatten() for each in output]),
    ),
    **{
        f"naive_{name}": Pair(name, f"naive {name}", ours(name), naive(name), scores, flat)
        for name in ("rollout", "gradient_rollout", "generic_attention")
    },
}
"""Pairs by name."""
