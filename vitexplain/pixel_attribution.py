"""Attribution of pixels, gathered by patch; and methods that read it off the gradient at the image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from .attention import widen
from .capture import Capture
from .errors import CaptureError
from .method import GradientMethod, Method
from .needs import Needs
from .options import option
from .patch_pixels import gather_by_patch


@dataclass(frozen=True)
class PixelAttribution(Method):
    """Base of methods that attribute to pixels."""

    reduction: str = option(
        "sum",
        "sum: signed, over channels and pixels of a patch; mean_abs: mean of the absolute values, without a sign",
        choices=("sum", "mean_abs"),
    )

    @property
    def signed(self) -> bool:
        """Sums keep the sign of the attribution."""
        return self.reduction == "sum"

    @abstractmethod
    def pixels(self, capture: Capture) -> Tensor:
        """Attribution (B, channels, H, W) of every pixel to the explained score, float32 or wider."""

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w)."""
        pixels = self.pixels(capture)
        if self.reduction == "sum":
            return gather_by_patch(pixels.sum(1), capture.grid, capture.extent, mean=False)
        return gather_by_patch(pixels.abs().mean(1), capture.grid, capture.extent, mean=True)


@dataclass(frozen=True)
class ImageGradientAttribution(GradientMethod, PixelAttribution):
    """Base of methods that read the gradient at the image, which the capture's own backward pass brings."""

    @property
    def needs(self) -> Needs:
        """The gradient at the image."""
        return replace(super().needs, image_gradient=True)

    def image_gradient(self, capture: Capture) -> Tensor:
        """Gradient (B, channels, H, W) of the explained score at the image, float32 or wider.

        Raises:
            CaptureError: it was not captured.
        """
        gradient = capture.meeting(self.needs).image_gradient
        if gradient is None:
            raise CaptureError("there is no gradient at the image: ask for it with Needs(image_gradient=True)")
        return widen(gradient)
