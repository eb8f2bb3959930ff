"""captum's algorithms as methods: its attribution of pixels on a borrowed model, gathered by patch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import Capture
from .method import GradientMethod, Method
from .needs import Needs
from .options import option
from .pixel_attribution import PixelAttribution
from .target_response import BASELINES, OUTPUTS, ImageResponse, TargetResponse


@dataclass(frozen=True)
class SampledAttribution(GradientMethod, PixelAttribution):
    """Base of methods that average gradients at several changed copies of each image, through captum.

    Balanced gradients are those of each copy's own forward, with the scales, gates and attention of that copy.
    """

    batch_size: int = option(64, "images in one forward and backward pass; on the CPU never more than 8", minimum=1)

    @property
    def needs(self) -> Needs:
        """Nothing of the blocks; the rules of the backward pass are those of the copies, and not of the capture."""
        return Needs()

    @abstractmethod
    def image_pixels(self, one: ImageResponse) -> Tensor:
        """Attribution (1, channels, H, W) of the pixels of one image to the explained score."""

    def pixels(self, capture: Capture) -> Tensor:
        """Attribution (B, channels, H, W), image by image.

        Raises:
            TargetError: the target is a function of the logits without a gradient.
            UnsupportedModelError: the gradient is to be balanced, and the model computes something without a rule.
        """
        response = TargetResponse.of(capture, self.info.name, batch_size=self.batch_size, backward=self.backward)
        return torch.cat([self.image_pixels(each).detach() for each in response.each()])


@dataclass(frozen=True)
class AblationAttribution(Method):
    """Base of methods that replace parts of the image through captum, without gradients."""

    baseline: str = option(
        "zeros",
        "what replaces pixels, in the model's normalised input: zeros (the mean colour), the image's own mean colour, "
        "the blurred image, or noise",
        choices=BASELINES,
    )
    output: str = option("logit", "what is explained of a class; of two, their difference", choices=OUTPUTS)
    batch_size: int = option(64, "images in one forward pass; on the CPU never more than 8", minimum=1)

    @abstractmethod
    def image_scores(self, one: ImageResponse, grid: tuple[int, int], extent: tuple[int, int] | None) -> Tensor:
        """Scores (1, h, w) of one image, whose patches form a grid (h, w), and take up `extent` (see `Capture`)."""

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w), float32 or wider."""
        response = TargetResponse.of(capture, self.info.name, self.output, self.batch_size)
        scores = torch.cat([self.image_scores(each, capture.grid, capture.extent) for each in response.each()])
        return scores.detach().to(response.images)
