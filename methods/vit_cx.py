"""ViT-CX: what the model's own features show, asked about one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.feature_masks import merged_channels
from vitexplain.method import Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.patch_pixels import Extent, enlarged
from vitexplain.randomness import DRAWN
from vitexplain.registry import register_method
from vitexplain.target_response import ImageResponse, TargetResponse


@register_method(
    "vit_cx",
    title="ViT-CX",
    paper="Xie et al., ViT-CX: Causal Explanation of Vision Transformers, IJCAI 2023",
    class_specific=True,
    passes="(1 + 2K)F",
    aliases=("vitcx",),
)
@dataclass(frozen=True)
class ViTCX(Method):
    r"""Masks made of the features of the last block, weighted by what they do to the class's probability.

    .. math:: s_k = p_c\bigl(x \circ M_k + \epsilon \circ (1 - M_k)\bigr) - p_c\bigl(x + \epsilon \circ (1 - M_k)\bigr)
        + p_c(x), \qquad m = \Bigl(\frac1K \frac{\sum_k s_k M_k}{\sum_k M_k}\Bigr)^+

    with M_k the channels of the normalised input of one block's attention, each scaled to [0, 1], alike ones summed
    and scaled again, and ε Gaussian noise, the same for every image. The second term takes away what the noise alone
    does. Masks are made on the patch grid and enlarged bilinearly to be applied. K depends on the image and is at most
    the number of channels; each mask costs two forward passes, besides the capture's. Scores (B, h, w); below zero,
    where noise outweighs the class, they are cut off. For a contrast, the difference of two probabilities takes the
    place of p_c, for a function of the logits its own value, and nothing is cut off.
    """

    layer: int = option(-1, "block whose attention input is read, zero-based; negative counts from the last")
    distance: float = option(0.1, "largest cosine distance of channels that share a mask", minimum=0, maximum=2)
    noise: float = option(0.1, "standard deviation, in the model's normalised input", minimum=0)
    seed: int = option(0, "seed of the noise", minimum=0, maximum=2**32 - 1)
    batch_size: int = option(64, "images in one forward pass; on the CPU never more than 8", minimum=1)

    @property
    def needs(self) -> Needs:
        """The attention input of one block."""
        return Needs(states=frozenset({"attention_input"}), from_block=self.layer)

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w)."""
        response = TargetResponse.of(capture, self.info.name, "probability", self.batch_size)
        block = capture.blocks[self.layer]
        patches = block.state("attention_input")[:, block.layout.prefix :]
        masks = [merged_channels(each, self.distance).view(-1, *block.layout.grid) for each in patches]
        size = (response.images.shape[-2], response.images.shape[-1])
        extent = capture.adapter.extent(size, block.layout.grid)
        scores = [self._scores(*each, extent) for each in zip(response.each(), masks, response.clean, strict=True)]
        # a probability has a zero; the level of a contrast or a function says nothing
        return torch.stack(scores) if capture.classes is None else torch.stack(scores).clamp(min=0)

    def _scores(self, one: ImageResponse, masks: Tensor, clean: Tensor, extent: Extent | None) -> Tensor:
        """Scores (h, w) of one image, not cut off.

        Args:
            one: the image.
            masks: (K, h, w).
            clean: (), what is said of the image as it is.
            extent: pixels (height, width) that the masks' grid takes up; None for the image.
        """
        if not len(masks):  # features that are the same everywhere: the explainer says that the map is constant
            return masks.sum(0)
        image = one.image
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(image.shape[1:], generator=generator, **DRAWN).to(image) * self.noise

        def noisy(numbers: Tensor) -> Tensor:
            mask = enlarged(masks.to(image)[numbers // 2], image.shape[-2:], "bilinear", extent)[:, None]
            shown = torch.where((numbers % 2 == 0)[:, None, None, None], mask, 1)
            return image * shown + noise * (1 - mask)

        masked, whole = one.answers(2 * len(masks), noisy).view(-1, 2).unbind(1)
        weights = (masked - whole + clean)[:, None, None].to(masks)
        covered = masks.sum(0).clamp(min=torch.finfo(masks.dtype).tiny)
        return (weights * masks).sum(0) / covered / len(masks)
