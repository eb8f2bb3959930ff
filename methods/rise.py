"""RISE: the model asked about randomly masked images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.options import option
from vitexplain.patch_pixels import gather_by_patch
from vitexplain.random_masks import RandomMasks
from vitexplain.registry import register_method
from vitexplain.target_response import ImageResponse, TargetResponse


@register_method(
    "rise",
    title="RISE",
    paper="Petsiuk, Das and Saenko, RISE, BMVC 2018, section 3",
    class_specific=True,
    passes="4001F",
)
@dataclass(frozen=True)
class Rise(Method):
    r"""Mean probability of the class over randomly masked images in which a patch is seen.

    .. math:: m_j = \frac{1}{n \, p} \sum_{i=1}^n p_c(x \circ M_i) \, M_i(j)

    with M_i a coarse grid of cells, each kept with probability p, enlarged bilinearly and shifted by chance, and M_i(j)
    its mean over patch j. What is masked takes the mean colour (zero in the model's normalised input). No gradient and
    nothing of the model's inside is needed. Every image gets the same masks, from `seed`. Each mask costs a forward
    pass, besides the capture's; fewer than a thousand leave much noise. Scores (B, h, w), about the class's mean
    probability where a patch does not matter. For a contrast, the difference of two probabilities takes the place of
    p_c, for a function of the logits its own value; scores may then be negative.
    """

    masks: int = option(4000, "masks that the model is asked about", minimum=1)
    cells: int = option(7, "cells of a mask along the image's shorter side", minimum=1)
    probability: float = option(0.5, "chance that a cell is kept", minimum=0.01, maximum=0.99)
    seed: int = option(0, "seed of the masks", minimum=0, maximum=2**32 - 1)
    batch_size: int = option(64, "images in one forward pass; on the CPU never more than 8", minimum=1)

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w)."""
        response = TargetResponse.of(capture, self.info.name, "probability", self.batch_size)
        height, width = response.images.shape[-2:]
        masks = RandomMasks.draw(self.masks, (height, width), self.cells, self.probability, self.seed)

        def asked(one: ImageResponse) -> Tensor:
            return one.answers(self.masks, lambda numbers: one.image * masks(numbers)[:, None])

        answers = torch.stack([asked(one) for one in response.each()])
        numbers = torch.split(torch.arange(self.masks, device=answers.device), response.forward_size)
        patches = torch.cat([gather_by_patch(masks(part), capture.grid, capture.extent, mean=True) for part in numbers])
        return torch.einsum("bm,mhw->bhw", answers, patches.to(answers)) / (self.masks * self.probability)
