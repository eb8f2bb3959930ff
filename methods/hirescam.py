"""HiResCAM on patch tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.activation_maps import ActivationMap
from vitexplain.cancellation import check_left_over
from vitexplain.registry import register_method


@register_method(
    "hirescam",
    title="HiResCAM",
    paper="Draelos and Carin, HiResCAM, arXiv 2011.08891, 2020; on the input of a block's attention",
    class_specific=True,
    passes="1F + 1B",
)
@dataclass(frozen=True)
class HiResCAM(ActivationMap):
    r"""Features times gradient, summed over channels: Grad-CAM without the mean over patches.

    .. math:: m_j = \Bigl(\sum_k \frac{\partial y}{\partial x_{jk}} x_{jk}\Bigr)^+

    with x the normalised input of one block's attention. A patch is never credited for what the gradient asks of
    another one. The paper's map has no ReLU (``relu=False``); the default keeps positive evidence alone, to be seen
    beside Grad-CAM. Where all that follows the features is a norm, the gradient is at right angles to them and every
    score is zero; such models are refused, unless the gradient is balanced. Scores (B, N).
    """

    def weigh(self, tokens: Tensor, gradient: Tensor, prefix: int) -> Tensor:
        """Gradient times features, summed over channels.

        Raises:
            UnsupportedModelError: the sums of an image cancel on every patch.
        """
        terms = gradient * tokens
        check_left_over(terms[:, prefix:].sum(2), terms[:, prefix:].abs().sum(2))
        return terms.sum(2)
