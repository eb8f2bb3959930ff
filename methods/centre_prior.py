"""Centre prior: the baseline that looks at the middle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.method import Method
from vitexplain.options import option
from vitexplain.registry import register_method


@register_method(
    "centre_prior",
    title="Centre prior",
    paper="Tatler, The central fixation bias in scene viewing, Journal of Vision 7(14), 2007 (the bias itself)",
    class_specific=False,
    passes="1F",
    aliases=("center_prior", "gaussian_prior"),
)
@dataclass(frozen=True)
class CentrePrior(Method):
    r"""A Gaussian in the middle of the image, whatever the image: photographers put objects there.

    .. math:: m(u, v) = \exp\Bigl(-\frac{(u - \tfrac12)^2 + (v - \tfrac12)^2}{2 \sigma^2}\Bigr)

    with u and v the place of a patch's centre, in shares of the image's height and width. A localisation score means
    little without this one beside it. Scores (B, h, w) in (0, 1], the same for every image.
    """

    sigma: float = option(0.25, "standard deviation, as a share of each side of the image", minimum=0.01, maximum=10)

    def attribute(self, capture: Capture) -> Tensor:
        """The Gaussian (B, h, w)."""
        like = widen(capture.images)
        rows, columns = (self._bell((torch.arange(side).to(like) + 0.5) / side) for side in capture.grid)
        return torch.outer(rows, columns).expand(len(like), -1, -1)

    def _bell(self, places: Tensor) -> Tensor:
        return torch.exp(-((places - 0.5) ** 2) / (2 * self.sigma**2))
