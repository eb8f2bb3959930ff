"""AttnLRP: layer-wise relevance propagation for transformers, as input times a modified gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.linear_relevance import AttnLRPRules
from vitexplain.method import Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.patch_pixels import gather_by_patch
from vitexplain.registry import register_method


@register_method(
    "attnlrp",
    title="AttnLRP",
    paper="Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation, ICML 2024, eq. 3-15",
    class_specific=True,
    passes="1F + 1B",
    signed=True,
    aliases=("attn_lrp", "cp_lrp"),
)
@dataclass(frozen=True)
class AttnLRP(Method):
    r"""The relevance of each pixel as input times a modified gradient, summed over its patch.

    .. math:: m_j = \sum_{p \in j} x_p\, \tilde g_p, \qquad
        R_i = \sum_j \frac{x_i w_{ji}}{z_j + \epsilon\,\mathrm{sign} z_j} R_j \text{ (linear)}, \qquad
        R_i = x_i \Bigl(R_i' - s_i \sum_k R_k'\Bigr) \text{ (softmax)}

    A product of two states gives half to each; LayerNorm's denominator and the gate of GELU and SiLU are constant.
    Written as R = x g̃ these are changes of the plain backward pass, and the softmax rule is its derivative. The sum of
    all relevance is the target's score but for what biases, position embeddings, prefix tokens, the softmax and ε take.

    `attention="split"` is AttnLRP. `attention="constant"` holds A constant (CP-LRP, Ali et al., ICML 2022), as the
    released code does for vision transformers, with `gamma` from 0 to 1 and `conv_gamma` from 0.1 to 100 tried by eye.
    Scores (B, h, w).
    """

    attention: str = option(
        "split",
        "split: relevance goes through the softmax to queries and keys too; constant: through the values alone",
        choices=("split", "constant"),
    )
    epsilon: float = option(1e-8, "stabiliser of linear maps, in units of their output", minimum=0)
    gamma: float = option(0.0, "how much contributions of the output's sign count extra in linear layers", minimum=0)
    conv_gamma: float = option(0.0, "the same in convolutions", minimum=0)

    @property
    def needs(self) -> Needs:
        """The modified gradient at the pixels."""
        rules = AttnLRPRules(self.attention == "split", self.epsilon, self.gamma, self.conv_gamma)
        return Needs(image_gradient=True, backward=rules)

    def attribute(self, capture: Capture) -> Tensor:
        """Relevance of the pixels of each patch (B, h, w)."""
        gradient = capture.meeting(self.needs).image_gradient
        relevance = (widen(capture.images) * widen(gradient)).sum(1)
        return gather_by_patch(relevance, capture.grid, capture.extent, mean=False)
