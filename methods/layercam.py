"""LayerCAM on patch tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.activation_maps import ActivationMap
from vitexplain.registry import register_method


@register_method(
    "layercam",
    title="LayerCAM",
    paper="Jiang et al., LayerCAM, IEEE TIP 2021; on the input of a block's attention",
    class_specific=True,
    passes="1F + 1B",
)
@dataclass(frozen=True)
class LayerCAM(ActivationMap):
    r"""Features times their positive gradients, each patch with its own.

    .. math:: m_j = \Bigl(\sum_k \Bigl(\frac{\partial y}{\partial x_{jk}}\Bigr)^+ x_{jk}\Bigr)^+

    with x the normalised input of one block's attention. Made for earlier layers too: choose one with `layer`. Behind
    a ReLU, as in the paper, features have one sign; here they have both, and a negative feature counts against its
    patch. Scores (B, N).
    """

    def weigh(self, tokens: Tensor, gradient: Tensor, prefix: int) -> Tensor:
        """Positive gradient times features, summed over channels."""
        return (gradient.clamp(min=0) * tokens).sum(2)
