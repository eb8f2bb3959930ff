"""Grad-CAM on patch tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.activation_maps import ActivationMap
from vitexplain.registry import register_method


@register_method(
    "gradcam",
    title="Grad-CAM",
    paper="Selvaraju et al., Grad-CAM, ICCV 2017, eq. 1-2; on the input of a block's attention, as pytorch-grad-cam",
    class_specific=True,
    passes="1F + 1B",
)
@dataclass(frozen=True)
class GradCAM(ActivationMap):
    r"""Channels of the patch tokens, weighted by their mean gradient.

    .. math:: \alpha_k = \frac1P \sum_j \frac{\partial y}{\partial x_{jk}}, \qquad
        m_j = \Bigl(\sum_k \alpha_k x_{jk}\Bigr)^+

    with x the normalised input of one block's attention. It is read there, not at the block's output: behind the
    last attention a CLS head gives patch tokens no gradient. The graph is cut at that point, so the backward pass
    covers only the blocks above. Scores (B, N), prefix tokens scored but not averaged over.
    """

    def weigh(self, tokens: Tensor, gradient: Tensor, prefix: int) -> Tensor:
        """Channels times their mean gradient over patches, summed."""
        weights = gradient[:, prefix:].mean(1, keepdim=True)
        return (weights * tokens).sum(2)
