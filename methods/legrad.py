"""LeGrad."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitexplain.attention import widen
from vitexplain.block_scores import RECORDED, score_blocks
from vitexplain.capture import Capture
from vitexplain.errors import UnsupportedModelError
from vitexplain.method import GradientMethod
from vitexplain.models.token_head import TokenHead, token_head
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.randomness import DRAWN
from vitexplain.registry import register_method
from vitexplain.target_response import TargetResponse


@register_method(
    "legrad",
    title="LeGrad",
    paper="Bousselham et al., LeGrad: An Explainability Method for Vision Transformers via Feature Formation, 2024",
    class_specific=True,
    passes="1F + 1B",
)
@dataclass(frozen=True)
class LeGrad(GradientMethod):
    r"""How attention in the last blocks moves what the classifier says of the output of each of them.

    .. math:: m_j = \sum_l \frac{1}{HN} \sum_{h,i} \Bigl(\frac{\partial y^l}{\partial A_{l,h,ij}}\Bigr)^+, \qquad
        y^l = \mathrm{head}(\mathrm{norm}(\mathrm{pool}(x^l)))

    with :math:`x^l` the tokens that leave block l. No attention value enters, and no block is followed into another:
    the score of a block goes back through that block alone, as far as its attention (`vitexplain.block_scores`): where
    a CLS head is read as it is, that is one token a block, computed again, and little more than the forward for all
    blocks together; with the mean of all tokens it is less than half of what the forward of those blocks was. The
    released code pools all tokens by their mean, prefix and all, whatever the model's head reads; `pooling="head"`
    reads them as the head does, which is the paper's formula for a CLS head. Scores (B, N) >= 0.
    """

    layers: int = option(2, "how many of the last blocks are read; all where there are fewer", minimum=1)
    pooling: str = option(
        "mean", "what the classifier reads of a block: mean of all tokens, or as the head", choices=("mean", "head")
    )
    normalised: bool = option(
        False, "score by the share of the logits' length (biases left out), as for image and text"
    )

    @property
    def needs(self) -> Needs:
        """The graphs of the blocks; or, where one token a block may do, what it takes to compute that again."""
        asked = Needs(apart=self.layers) if self.pooling == "mean" else RECORDED
        return replace(asked, from_block=-1 if self.layers == 1 else 0, backward=self.backward)

    @property
    def follows_blocks(self) -> bool:
        """False: the score of a block goes back through that block alone."""
        return False

    def attribute(self, capture: Capture) -> Tensor:
        """Mean positive gradients (B, N), summed over blocks.

        Raises:
            UnsupportedModelError: the head is no linear map of tokens, of their mean or of their attention pool.
        """
        response, head = TargetResponse.of(capture, self.info.name), token_head(capture)
        everyone = torch.arange(len(capture.images), device="cpu")

        def score(tokens: Tensor) -> Tensor:
            return response.read(self._logits(head, tokens), everyone)

        blocks = score_blocks(capture, self.layers, score, self._tokens_read(capture, head), self.backward)
        rows = []
        for block in blocks:
            uniform = capture.images.new_full((len(capture.images), block.layout.count), 1 / block.layout.count)
            if block.windows is None:  # query rows without a gradient add nothing
                uniform = uniform * (block.output_gradient != 0).any(3).any(1)
            rows.append(blocks[0].receive(block.propagate(uniform, lambda tile: tile.gradient.clamp(min=0)).mean(1)))
        return torch.stack(rows).sum(0)

    def _tokens_read(self, capture: Capture, head: TokenHead) -> int | None:
        """The number of prefix tokens, if the head reads no others; None if all may be read."""
        prefix, final = capture.layouts[-1].prefix, capture.blocks[-1].state("out")
        pools = any(reading.pool for each in head.branches for reading in each.readings)
        if self.pooling == "mean" or prefix == 0 or pools:
            return None
        noise = torch.randn(1, *final.shape[1:], generator=torch.Generator().manual_seed(0), **DRAWN).to(final)
        alone, all_tokens = head.image_logits(noise[:, :prefix]), head.image_logits(noise)
        return prefix if torch.allclose(alone, all_tokens, rtol=1e-4, atol=1e-6) else None

    def _logits(self, head: TokenHead, tokens: Tensor) -> Tensor:
        """What the head says (B, C) of the tokens (B, N, D) that leave a block."""
        tokens, width = widen(tokens), head.heads[0].in_features
        if tokens.shape[2] * len(head.branches[0].readings) != width:
            raise UnsupportedModelError(
                f"found a block that puts out {tokens.shape[2]} features a token, expected the {width} that the head "
                "takes: read fewer of the last blocks (layers=1), or use generic_attention"
            )
        with nullcontext() if self.backward is None else self.backward.watching(len(tokens), "BND"):
            if self.pooling == "head":
                logits = head.image_logits(tokens)
            else:
                logits = head.token_logits(tokens.mean(1, keepdim=True))[:, 0]
        if not self.normalised:
            return logits
        return F.normalize(logits - _bias(head))


def _bias(head: TokenHead) -> Tensor:
    """What is added in the linear heads (C,), averaged as they are."""
    heads: list[Any] = list(head.heads)
    nothing = [next(each.parameters()).new_zeros(each.in_features) for each in heads]
    return torch.stack([widen(each(zeros)) for each, zeros in zip(heads, nothing, strict=True)]).mean(0)
