"""Eigen-CAM on patch tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method


@register_method(
    "eigencam",
    title="Eigen-CAM",
    paper="Muhammad and Yeasin, Eigen-CAM, IJCNN 2020; centred, on the input of a block's attention",
    class_specific=False,
    passes="1F",
)
@dataclass(frozen=True)
class EigenCAM(Method):
    r"""Patch tokens along their first principal direction.

    .. math:: X - \bar X = U \Sigma V^\top, \qquad m = s \, (X - \bar X) \, v_1

    with X (P, D) the patches of the normalised input of one block's attention and X̄ their mean. It asks for no class
    and no gradient: the map shows what differs most within the image. A singular vector has no sign of its own, so
    s ∈ {1, -1} is chosen such that X̄ lies on the negative side: most patches are background, and the mean leans that
    way. (On the 16 photographs of the parity tests this is the side of generic attention's map in 13, and the skewness
    of the scores would tell in 6.) Scores (B, N).
    """

    layer: int = option(-1, "block whose attention input is read, zero-based; negative counts from the last")
    relu: bool = option(True, "keep the side that stands out only; False keeps both, around zero")

    @property
    def needs(self) -> Needs:
        """The attention input of one block."""
        return Needs(states=frozenset({"attention_input"}), from_block=self.layer)

    @property
    def signed(self) -> bool:
        """Both sides of the mean without the final ReLU."""
        return not self.relu

    def attribute(self, capture: Capture) -> Tensor:
        """Projections (B, N)."""
        block = capture.blocks[self.layer]
        tokens, prefix = block.state("attention_input"), block.layout.prefix
        mean = tokens[:, prefix:].mean(1, keepdim=True)
        centred = tokens - mean
        patches = centred[:, prefix:]
        # directions that explain nearly as much as the first amplify rounding; MPS has no double precision
        patches = patches if patches.device.type == "mps" else patches.double()
        direction = torch.linalg.svd(patches, full_matrices=False).Vh[:, 0].to(tokens)
        towards_mean = (mean[:, 0] * direction).sum(1, keepdim=True) > 0
        direction = torch.where(towards_mean, -direction, direction)
        scores = (centred * direction[:, None]).sum(2)
        return scores.clamp(min=0) if self.relu else scores
