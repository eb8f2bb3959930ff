"""SmoothGrad: gradients at noisy copies of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.captum_attribution import SampledAttribution
from vitexplain.options import option
from vitexplain.randomness import normal_draws
from vitexplain.registry import register_method
from vitexplain.target_response import ImageResponse


@register_method(
    "smoothgrad",
    title="SmoothGrad",
    paper="Smilkov et al., SmoothGrad, arXiv 1706.03825, 2017",
    class_specific=True,
    passes="51F + 50B",
)
@dataclass(frozen=True)
class SmoothGrad(SampledAttribution):
    r"""Mean gradient at pixels over copies of the image with Gaussian noise; the gradients are captum's.

    .. math:: m_j = \frac{1}{|j|} \sum_{p \in j} \Bigl|\frac1n \sum_{i=1}^n
        \frac{\partial y}{\partial x_p}(x + \epsilon_i)\Bigr|,
        \qquad \epsilon_i \sim \mathcal N\bigl(0, \sigma^2 (\max x - \min x)^2\bigr)

    with p over pixels and channels of patch j. Every image gets the same draws, from `seed`, whatever the batch and the
    device. A balanced gradient takes the place of the derivative at every copy. One forward and one backward pass a
    copy, besides the capture's forward. Scores (B, h, w).
    """

    reduction: str = option(
        "mean_abs",
        "mean_abs: mean of the absolute smoothed gradients of a patch; sum: signed, over its channels and pixels",
        choices=("sum", "mean_abs"),
    )
    samples: int = option(50, "noisy copies of each image", minimum=1)
    noise: float = option(0.15, "standard deviation, as a share of the image's range of values", minimum=0, maximum=1)
    seed: int = option(0, "seed of the noise", minimum=0, maximum=2**32 - 1)

    def image_pixels(self, one: ImageResponse) -> Tensor:
        """Smoothed gradients (1, channels, H, W)."""
        from captum.attr import Saliency

        image, generator = one.image, torch.Generator().manual_seed(self.seed)
        deviation = self.noise * (image.max() - image.min())
        total = torch.zeros_like(image)
        for part in torch.split(torch.arange(self.samples), one.batch.part_of(self.samples)):
            copies = image + deviation * normal_draws(len(part), image, generator)
            total += Saliency(one).attribute(copies.requires_grad_(), abs=False).sum(0)
        return total / self.samples
