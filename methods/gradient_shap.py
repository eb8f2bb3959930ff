"""GradientSHAP: expected gradients at pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.captum_attribution import SampledAttribution
from vitexplain.options import option
from vitexplain.randomness import DRAWN, normal_draws
from vitexplain.registry import register_method
from vitexplain.target_response import BASELINES, ImageResponse


@register_method(
    "gradient_shap",
    title="GradientSHAP",
    paper="Lundberg and Lee, NeurIPS 2017; as expected gradients, Erion et al., Nature Machine Intelligence 2021",
    class_specific=True,
    passes="51F + 50B",
    signed=True,
)
@dataclass(frozen=True)
class GradientShap(SampledAttribution):
    r"""Gradients at random points between a baseline and noisy copies of the image, times the way.

    .. math:: m_j = \sum_{p \in j} \mathbb E_{t, \epsilon} \Bigl[(x_p + \epsilon_p - b_p)
        \frac{\partial y}{\partial x_p}(b + t (x + \epsilon - b))\Bigr], \qquad t \sim \mathcal U(0, 1)

    with p over pixels and channels of patch j and b the baseline image; ε is Gaussian. The expectation is a mean of
    `samples` draws, the same for every image, whatever the batch and the device; the gradients are captum's. A
    distribution of baselines would be images of the data that the model was trained on; there are none here, so b is
    one image, and the method is integrated gradients by chance instead of by steps. A balanced gradient takes the place
    of the derivative at every point; like those of `integrated_gradients`, scores then sum to no difference of outputs.
    One forward and one backward pass a draw, besides the capture's forward. Scores (B, h, w).
    """

    baseline: str = option("zeros", "where the path begins, in the model's normalised input", choices=BASELINES)
    samples: int = option(50, "random points", minimum=1)
    noise: float = option(0.09, "standard deviation, in the model's normalised input", minimum=0)
    seed: int = option(0, "seed of the points and the noise", minimum=0, maximum=2**32 - 1)

    def image_pixels(self, one: ImageResponse) -> Tensor:
        """Attribution (1, channels, H, W)."""
        from captum.attr import Saliency

        image, baseline = one.image, one.baseline(self.baseline)
        generator = torch.Generator().manual_seed(self.seed)
        shares = torch.rand(self.samples, 1, 1, 1, generator=generator, **DRAWN).to(image)
        total = torch.zeros_like(baseline)
        for part in torch.split(shares, one.batch.part_of(self.samples)):
            way = image + self.noise * normal_draws(len(part), image, generator) - baseline
            points = baseline + part * way
            total += (way * Saliency(one).attribute(points.requires_grad_(), abs=False)).sum(0)
        return total / self.samples
