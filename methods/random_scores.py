"""Random scores: the baseline that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.metrics.draws import generators
from vitexplain.options import option
from vitexplain.randomness import DRAWN
from vitexplain.registry import register_method


@register_method(
    "random_scores",
    title="Random scores",
    paper="no paper; the lower end of every table, 2026",
    class_specific=False,
    passes="1F",
    aliases=("random", "random_baseline"),
)
@dataclass(frozen=True)
class RandomScores(Method):
    r"""Numbers that have nothing to do with the model: what a method has to beat.

    .. math:: m_j \sim \mathcal U(0, 1), \qquad \text{independent over patches and images}

    Drawn from `seed` and the image's own pixels, as a bfloat16 model sees them: the same float32 input has the same map
    alone, in any batch and under any model in float32, float64 or bfloat16 with as many patches, while two images have
    nothing in common, so that means over a data set are what chance gives. A float16 model gives other draws, the same
    under any other float16 model: its pixels are rounded twice. Scores (B, h, w) in [0, 1).
    """

    seed: int = option(0, "other draws for the same images", minimum=0, maximum=2**32 - 1)

    def attribute(self, capture: Capture) -> Tensor:
        """Draws (B, h, w)."""
        own = generators(capture.images.bfloat16(), self.seed)
        maps = [torch.rand(capture.grid, generator=each, **DRAWN) for each in own]
        return torch.stack(maps).to(widen(capture.images))
