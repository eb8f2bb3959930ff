"""Class activation maps on patch tokens: what Grad-CAM and its relatives share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from .capture import Capture
from .method import GradientMethod
from .needs import Needs
from .options import option


@dataclass(frozen=True)
class ActivationMap(GradientMethod):
    """Base of methods that weigh the channels of one block's attention input by their gradient.

    It is read there, not at the block's output: behind the last attention a CLS head gives patch tokens no gradient.
    The graph is cut at that point, so the backward pass covers only the blocks above.
    """

    layer: int = option(-1, "block whose attention input is read, zero-based; negative counts from the last")
    relu: bool = option(True, "keep positive evidence only, as in the paper; False gives a signed map")

    @property
    def needs(self) -> Needs:
        """The attention input of one block, and its gradient."""
        return replace(super().needs, state_gradients=frozenset({"attention_input"}), from_block=self.layer)

    @property
    def signed(self) -> bool:
        """Signed without the final ReLU."""
        return not self.relu

    @abstractmethod
    def weigh(self, tokens: Tensor, gradient: Tensor, prefix: int) -> Tensor:
        """Scores (B, N) before the ReLU.

        Args:
            tokens: (B, N, D) normalised input of the block's attention, float32 or wider.
            gradient: (B, N, D) of the explained score by `tokens`.
            prefix: number of prefix tokens, which are scored, but not averaged over.
        """

    def attribute(self, capture: Capture) -> Tensor:
        """Weighted channels (B, N)."""
        block = capture.meeting(self.needs).blocks[self.layer]
        tokens, gradient = block.state("attention_input"), block.state_gradient("attention_input")
        scores = self.weigh(tokens, gradient, block.layout.prefix)
        return scores.clamp(min=0) if self.relu else scores
