"""Methods of other packages, each beside the method here that does the same, and how they run in a given time.

Each side is a function of one subject, so that both see the same model, images and classes; what turns their outputs
into comparable rows is not timed. What a pair costs is a rough figure in plain forward passes, for planning alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
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
from .peer_cells import BY_TIME, without_places
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
from .processes import failure

STEPS = 10
"""Steps of integrated gradients, on both sides."""

Rows = Callable[[Any, Subject], Tensor]
"""Makes comparable rows (B, M) of what a run gives; or (2, B, M), of which each image takes the more alike."""

Outcome = Any
"""What a run gave, or a `Failure`."""

Cost = Callable[[int, int], float]
"""About how many plain forward passes one call takes, of the number of patches and the model's width."""


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
        cost: of one call of both sides, in forward passes of the same batch.
    """

    ours: str
    peer: str
    run_ours: Prepare
    run_peer: Prepare
    ours_rows: Rows
    peer_rows: Rows
    cost: Cost

    def names(self, name: str) -> dict[str, Any]:
        """The fields of a `peer_cells.Cell` that say what is compared; `name` is the pair's own."""
        return {"pair": name, "ours": self.ours, "peer": self.peer}


@dataclass(frozen=True)
class Plan:
    """How often a pair runs in one place.

    Attributes:
        call: seconds that one call of both sides takes, about.
        seconds: what all calls may take, where they are several.
        most: rounds, at most.
        longest: what one call may take.
    """

    call: float
    seconds: float
    most: int
    longest: float

    @property
    def warm(self) -> bool:
        """Whether a call that does not count goes before the rounds; where only one call fits, it is the round."""
        return self._calls > 1

    @property
    def rounds(self) -> int:
        """How many rounds fit; 0 where one call takes too long."""
        return min(self._calls - self.warm, self.most)

    @property
    def _calls(self) -> int:
        return max(int(self.seconds // self.call), 1) if self.call <= self.longest else 0

    @property
    def whole(self) -> float:
        """Seconds that all calls take, about."""
        return self.call * (self.rounds + self.warm)

    @property
    def left_out(self) -> str:
        """Why the pair does not run, if it does not."""
        if self.rounds:
            return ""
        return f"about {self.call:.0f} s for one call of both sides, {BY_TIME} {self.longest:g}"


@dataclass(frozen=True)
class Failure:
    """How a run failed: the exception's type and the first line of what it says."""

    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """From an exception."""
        return cls(without_places(failure(error))[:150])


def attempt(run: Callable[[], Outcome]) -> Outcome:
    """What a run gives; a `Failure` where it raises."""
    try:
        return run()
    except Exception as error:  # a peer may raise anything
        return Failure.of(error)


@dataclass
class Side:
    """One side of a pair, called once a round; it works until it fails.

    Attributes:
        run: the work; None where it could not be prepared.
        outcome: what the first call gave; a `Failure` after one in any call.
    """

    run: Run | None
    outcome: Outcome = None

    @classmethod
    def of(cls, prepare: Prepare, subject: Subject) -> Side:
        """Ready to run, or failed."""
        run = attempt(lambda: prepare(subject))
        return cls(None, run) if isinstance(run, Failure) else cls(run)

    @property
    def failure(self) -> str:
        """How it failed, if it did."""
        return self.outcome.text if isinstance(self.outcome, Failure) else ""

    def __call__(self) -> None:
        if self.run is not None and not self.failure:
            found = attempt(self.run)
            if self.outcome is None or isinstance(found, Failure):
                self.outcome = found


def passes(count: float) -> Cost:
    """So many forward passes, whatever the model."""
    return lambda *_: count


def windows_passes(patches: int, _: int) -> float:
    """One forward pass a window of 3 × 3 patches on a square grid, on both sides."""
    return 2.0 * (isqrt(patches) - 2) ** 2 + 3


def naive_passes(ours: float, plain: float, products: float) -> Cost:
    """A method here, and a recipe that also multiplies N×N matrices and does other work on them.

    In floating-point operations the product in each block is N² / (12 D² + 2 N D) of a forward pass.

    Args:
        ours: forward passes of the one.
        plain: forward passes of the other without those matrices.
        products: its work on the matrices, as a multiple of that product.
    """
    return lambda patches, width: ours + plain + products * patches**2 / (12 * width**2 + 2 * patches * width)


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
    return Pair(
        method, f"pytorch-grad-cam {name}", ours(method, **options), grad_cam(name), enlarged, flat, passes(4.2)
    )


def _eigen_cam() -> Pair:
    method, name = ours("eigencam", relu=False), "EigenCAM"
    return Pair("eigencam", f"pytorch-grad-cam {name}", method, grad_cam(name), enlarged_either_way, flat, passes(2.5))


PAIRS: dict[str, Pair] = {
    "gradcam": _cam("GradCAM", "gradcam"),
    "hirescam": _cam("HiResCAM", "hirescam"),
    "layercam": _cam("LayerCAM", "layercam"),
    "eigencam": _eigen_cam(),
    "saliency": Pair(
        "saliency", "captum Saliency", ours("saliency"), captum_pixels("Saliency"), scores, patch_means, passes(5)
    ),
    "integrated_gradients": Pair(
        f"integrated_gradients, {STEPS} steps",
        f"captum IntegratedGradients, {STEPS} steps",
        ours("integrated_gradients", steps=STEPS),
        captum_pixels("IntegratedGradients", n_steps=STEPS),
        scores,
        patch_sums,
        passes(6 * STEPS),
    ),
    "layer_gradcam": Pair(
        "gradcam", "captum LayerGradCam", ours("gradcam"), captum_layer_grad_cam, scores, flat, passes(2.3)
    ),
    "occlusion": Pair(
        "occlusion", "captum Occlusion", ours("occlusion"), captum_occlusion, scores, patch_means, windows_passes
    ),
    "legrad": Pair(
        "legrad, 4 layers",
        "torch-cam LeGrad, 4 layers",
        ours("legrad", layers=4),
        torchcam_legrad(4),
        scores,
        flat,
        passes(3),
    ),
    "attnlrp": Pair(
        "attnlrp, attention constant",
        "lxt AttnLRP",
        ours("attnlrp", attention="constant", epsilon=0.0),
        lxt_attnlrp,
        scores,
        patch_sums,
        passes(6),
    ),
    "deletion": Pair(
        f"deletion, {QUANTUS_STEPS} steps",
        f"Quantus PixelFlipping, {QUANTUS_STEPS} steps",
        our_deletion,
        quantus_flipping,
        lambda output, _: output["probability"][:, 1:],
        lambda output, _: torch.stack([torch.as_tensor(each).flatten() for each in output]),
        passes(2 * QUANTUS_STEPS + 3),
    ),
    **{
        f"naive_{name}": Pair(name, f"naive {name}", ours(name), naive(name), scores, flat, cost)
        for name, cost in {
            "rollout": naive_passes(1.3, 1.3, 1),
            "gradient_rollout": naive_passes(3, 3.5, 3),
            "generic_attention": naive_passes(2.6, 3, 1.8),
        }.items()
    },
}
"""Pairs by name."""
