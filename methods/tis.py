"""TIS: transformer input sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.feature_masks import central_channels
from vitexplain.method import Method
from vitexplain.metrics.token_dropping import TokenDropper
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method
from vitexplain.target_response import ImageResponse, TargetResponse
from vitexplain.token_sampling import token_dropper


@register_method(
    "tis",
    title="TIS",
    paper="Englebert et al., Explaining through Transformer Input Sampling, ICCV workshops 2023",
    class_specific=True,
    passes="1025F",
    aliases=("transformer_input_sampling",),
)
@dataclass(frozen=True)
class TransformerInputSampling(Method):
    r"""Mean probability of the class over sets of tokens that the model's own features choose.

    .. math:: m_j = \frac{\sum_k p_c(x_{S_k}) \, [j \in S_k]}{\sum_k [j \in S_k]}

    with S_k the half of the patches on which the k-th centroid is largest, centroids being those of k-means over the
    channels of all blocks' outputs, each channel a vector over patches. x_S is the image of which only the tokens S,
    and the prefix tokens, enter the first block: nothing is painted over, and the passes are shorter by as much. One
    of them a centroid, besides the capture's; there are no more centroids than channels. Only for models whose blocks
    treat tokens as a set. Scores (B, h, w); a patch that is in no set scores zero. For a contrast, the difference of
    two probabilities takes the place of p_c, for a function of the logits its own value; a patch in no set then has
    the lowest score, if that is below zero.
    """

    masks: int = option(1024, "centroids, and so sets of tokens", minimum=1)
    kept: float = option(0.5, "share of the patches in a set", minimum=0.01, maximum=1)
    iterations: int = option(10, "of k-means", minimum=1)
    seed: int = option(0, "seed of the channels that k-means starts from", minimum=0, maximum=2**32 - 1)
    batch_size: int = option(64, "images in one forward pass; on the CPU never more than 8", minimum=1)

    @property
    def needs(self) -> Needs:
        """The output of every block."""
        return Needs(states=frozenset({"out"}))

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w).

        Raises:
            UnsupportedModelError: tokens cannot be left out of this model.
        """
        response = TargetResponse.of(capture, self.info.name, "probability", self.batch_size)
        dropper = token_dropper(capture, self.batch_size)
        prefix = dropper.layout.prefix
        states = [each.state("out") for each in capture.blocks if each.layout == dropper.layout]
        # a last block may put out the class token alone
        tokens = torch.cat([each[:, prefix:] for each in states if each.shape[1] == dropper.layout.count], 2)
        scores = [self._scores(*each, dropper) for each in zip(response.each(), tokens, strict=True)]
        return torch.stack(scores).view(-1, *dropper.layout.grid)

    def _scores(self, one: ImageResponse, tokens: Tensor, dropper: TokenDropper) -> Tensor:
        """Scores (P,) of one image, from the features of its patches (P, L·D)."""
        centroids = central_channels(tokens, self.masks, self.iterations, self.seed)
        kept = centroids.topk(max(round(self.kept * len(tokens)), 1), dim=1).indices.sort(1).values
        answers = one.read(dropper.logits(one.image.expand(len(kept), -1, -1, -1), kept)).to(tokens)
        members = torch.zeros_like(centroids).scatter_(1, kept, 1)
        counts = members.sum(0)
        means = (answers[:, None] * members).sum(0) / counts.clamp(min=1)
        return torch.where(counts > 0, means, means.min())
