"""Sums of features times gradient that cancel wherever a norm follows the features, and leave rounding alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UnsupportedModelError

_CANCELLED = 1e-3
"""Largest score as a share of the largest sum of its absolute terms, below which only rounding is left."""


def check_left_over(scores: Tensor, magnitudes: Tensor) -> None:
    """Refuses maps of which nothing is left after cancellation; maps whose every term is zero pass.

    A norm takes away what a token does to its own length, so the gradient in front of it is at right angles to the
    token. Where all of a model sees a state through norms alone, features times gradient are zero on every patch.

    Args:
        scores: (B, P), sums of products.
        magnitudes: (B, P), the sums of their absolute values.

    Raises:
        UnsupportedModelError: an image's scores are all of the size of rounding.
    """
    largest, possible = scores.abs().amax(1), magnitudes.amax(1)
    if torch.any((largest < _CANCELLED * possible) & (possible > 0)):
        raise UnsupportedModelError(
            "features times gradient cancel on every patch: all that this model reads of these tokens passes a norm, "
            "whose gradient is at right angles to them; expected tokens behind the norm, or a residual stream that "
            "counts. Use gradient='balanced', under which a norm's scale is constant, or gradcam, layercam or "
            "generic_attention"
        )
