"""Layer-wise relevance propagation down to the pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.patch_pixels import gather_by_patch
from vitexplain.registry import register_method
from vitexplain.relevance import RelevanceRules


@register_method(
    "full_lrp",
    title="LRP",
    paper="Bach et al., On Pixel-Wise Explanations, PLoS ONE 2015; as the baseline of Chefer et al., CVPR 2021",
    class_specific=True,
    passes="1F + 1B",
    signed=True,
    aliases=("lrp", "layerwise_relevance_propagation"),
)
@dataclass(frozen=True)
class FullLRP(Method):
    r"""The relevance of each pixel, summed over its patch.

    .. math:: m_j = \sum_{p \in j} R_p

    with R propagated from the target through all blocks to the pixels p of patch j, over which the first convolution
    shares it by the rule of bounded inputs. The rules are those of `relevance_rules`; forward and relevance pass run
    in double precision, since relevance is divided by activations that cross zero. For the same reason the map hardly
    tells classes apart (on ViT-Ti and DeiT-Ti, ranks of two classes in one photograph correlate by 0.99 and more, or
    by -0.99), and weights rounded to half precision give another one. It is here to compare with. Scores (B, h, w).
    """

    rules: str = option(
        "baseline",
        "how sums and linear maps share relevance: as the LRP baselines of Chefer et al., or normalised as in their "
        "transformer attribution",
        choices=("baseline", "normalised"),
    )

    @property
    def needs(self) -> Needs:
        """The relevance of the pixels."""
        return Needs(image_gradient=True, backward=RelevanceRules(normalised=self.rules == "normalised"))

    def attribute(self, capture: Capture) -> Tensor:
        """Relevance of the pixels of each patch (B, h, w)."""
        relevance = capture.meeting(self.needs).image_gradient.sum(1)
        return gather_by_patch(relevance, capture.grid, capture.extent, mean=False).to(widen(capture.logits).dtype)
