"""Grad-CAM on patch tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.options import option
from vitexplain.record import Needs
from vitexplain.registry import register_method


@register_method(
    "gradcam",
    title="Grad-CAM",
    paper="Selvaraju et al., Grad-CAM, ICCV 2017, eq. 1-2; on the input of a block's attention, as pytorch-grad-cam",
    class_specific=True,
    passes="1F + 1B",
)
@dataclass(frozen=True)
class GradCAM(Method):
    r"""Channels of the patch tokens, weighted by their mean gradient.

    .. math:: \alpha_k = \frac1P \sum_j \frac{\partial y}{\partial x_{jk}}, \qquad
        m_j = \Bigl(\sum_k \alpha_k x_{jk}\Bigr)^+

    with x the normalised input of one block's attention. It is read there, not at the block's output: behind the
    last attention a CLS head gives patch tokens no gradient. The graph is cut at that point, so the backward pass
    covers only the blocks above. Scores (B, N), prefix tokens scored but not averaged over.
    """

    layer: int = option(-1, "block whose attention input is read, zero-based; negative counts from the last")
    relu: bool = option(True, "keep positive evidence only, as in the paper; False gives a signed map")

    @property
    def needs(self) -> Needs:
        """The attention input of one block, and its gradient."""
        return Needs(state_gradients=frozenset({"attention_input"}), from_block=self.layer)

    @property
    def signed(self) -> bool:
        """Signed without the final ReLU."""
        return not self.relu

    def attribute(self, capture: Capture) -> Tensor:
        """Weighted channels (B, N)."""
        block = capture.blocks[self.layer]
        tokens, gradient = block.state("attention_input"), block.state_gradient("attention_input")
        weights = gradient[:, block.layout.prefix :].mean(1, keepdim=True)
        scores = (weights * tokens).sum(2)
        return scores.clamp(min=0) if self.relu else scores
