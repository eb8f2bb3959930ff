"""Input times gradient at pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.pixel_attribution import ImageGradientAttribution
from vitexplain.registry import register_method


@register_method(
    "input_x_gradient",
    title="Input × gradient",
    paper="Shrikumar et al., Not Just a Black Box, arXiv 1605.01713, 2016",
    class_specific=True,
    passes="1F + 1B",
    signed=True,
)
@dataclass(frozen=True)
class InputXGradient(ImageGradientAttribution):
    r"""Pixels times the gradient of the explained score there.

    .. math:: m_j = \sum_{p \in j} x_p \frac{\partial y}{\partial x_p}

    with p over pixels and channels of patch j, in the model's normalised input: a pixel of the mean colour scores
    zero. Scores (B, h, w).
    """

    def pixels(self, capture: Capture) -> Tensor:
        """Attribution (B, channels, H, W)."""
        return widen(capture.images.detach()) * self.image_gradient(capture)
