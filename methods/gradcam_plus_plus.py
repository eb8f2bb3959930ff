"""Grad-CAM++ on patch tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.activation_maps import ActivationMap
from vitexplain.options import option
from vitexplain.registry import register_method

EPSILON = 1e-6
"""Added to the denominator of eq. 19, as pytorch-grad-cam does, so that a vanishing gradient gives no weight."""


@register_method(
    "gradcam_plus_plus",
    title="Grad-CAM++",
    paper="Chattopadhay et al., Grad-CAM++, WACV 2018, eq. 19; on the input of a block's attention",
    class_specific=True,
    passes="1F + 1B",
    aliases=("gradcam++",),
)
@dataclass(frozen=True)
class GradCAMPlusPlus(ActivationMap):
    r"""Channels of the patch tokens, weighted by their positive gradients, each patch with its own share.

    .. math:: a_{jk} = \frac{g_{jk}^2}{2 g_{jk}^2 + g_{jk}^3 \sum_i x_{ik} + \epsilon}, \qquad
        m_j = \Bigl(\sum_k x_{jk} \sum_i a_{ik} g_{ik}^+\Bigr)^+

    with x the normalised input of one block's attention, g the gradient of the logit by it, and i over patches. The
    paper takes the exponential of the logit as the score, by which the second and third derivatives become powers of
    the first. ε keeps the division defined; it also damps gradients smaller than its root.

    In the paper x comes from a ReLU and Σx cannot be negative. Tokens have both signs, so that with a negative Σx the
    denominator can come to zero and one gradient takes the whole map; by default such a sum therefore counts as zero.
    Scores (B, N), prefix tokens scored but not summed over.
    """

    clip: bool = option(
        True, "count a channel's sum as zero where it is negative; False as pytorch-grad-cam, and unstable"
    )

    def weigh(self, tokens: Tensor, gradient: Tensor, prefix: int) -> Tensor:
        """Channels times the weighted sum of their positive gradients over patches, summed."""
        patches = gradient[:, prefix:]
        square, total = patches.square(), tokens[:, prefix:].sum(1, keepdim=True)
        total = total.clamp(min=0) if self.clip else total
        shares = square / (2 * square + total * patches.pow(3) + EPSILON)
        weights = (shares * patches.clamp(min=0)).sum(1, keepdim=True)
        return (weights * tokens).sum(2)
