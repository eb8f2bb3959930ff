"""Saliency: the gradient at pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.options import option
from vitexplain.pixel_attribution import ImageGradientAttribution
from vitexplain.registry import register_method


@register_method(
    "saliency",
    title="Saliency",
    paper="Simonyan, Vedaldi and Zisserman, Deep Inside Convolutional Networks, ICLR workshop 2014, section 3",
    class_specific=True,
    passes="1F + 1B",
    aliases=("gradient", "vanilla_gradient"),
)
@dataclass(frozen=True)
class Saliency(ImageGradientAttribution):
    r"""Gradient of the explained score at pixels.

    .. math:: m_j = \frac{1}{|j|} \sum_{p \in j} \Bigl|\frac{\partial y}{\partial x_p}\Bigr|

    with p over pixels and channels of patch j. How much a small change of the patch would change the score; in which
    direction, an image does not say. The paper takes the largest channel where this takes their mean. Scores (B, h, w).
    """

    reduction: str = option(
        "mean_abs",
        "mean_abs: mean of the absolute gradients of a patch; sum: signed, over its channels and pixels",
        choices=("sum", "mean_abs"),
    )

    def pixels(self, capture: Capture) -> Tensor:
        """Gradients (B, channels, H, W)."""
        return self.image_gradient(capture)
