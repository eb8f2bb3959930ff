"""Integrated gradients at pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.captum_attribution import SampledAttribution
from vitexplain.options import option
from vitexplain.registry import register_method
from vitexplain.target_response import BASELINES, ImageResponse


@register_method(
    "integrated_gradients",
    title="Integrated gradients",
    paper="Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, ICML 2017, section 3",
    class_specific=True,
    passes="51F + 50B",
    signed=True,
)
@dataclass(frozen=True)
class IntegratedGradients(SampledAttribution):
    r"""Gradients along the straight path from a baseline to the image, times the way, by captum.

    .. math:: m_j = \sum_{p \in j} (x_p - b_p) \int_0^1 \frac{\partial y}{\partial x_p}(b + t (x - b)) \, dt

    with p over pixels and channels of patch j and b the baseline image, in the model's normalised input. The integral
    is a Gauss-Legendre sum of `steps` terms, so that all scores together approach y(x) - y(b). A balanced gradient, in
    the place of the derivative at every point, is the slope of a linear model that changes from point to point: then
    the scores no longer sum to y(x) - y(b). As many forward and backward passes as steps, besides the capture's
    forward. Scores (B, h, w).
    """

    baseline: str = option("zeros", "where the path begins, in the model's normalised input", choices=BASELINES)
    steps: int = option(50, "points on the path", minimum=1)

    def image_pixels(self, one: ImageResponse) -> Tensor:
        """Attribution (1, channels, H, W)."""
        from captum.attr import IntegratedGradients as CaptumIntegratedGradients

        attribution: Tensor = CaptumIntegratedGradients(one).attribute(
            one.image.requires_grad_(),
            baselines=one.baseline(self.baseline),
            n_steps=self.steps,
            internal_batch_size=one.batch.part_of(self.steps),
        )
        return attribution
