"""The rules of layer-wise relevance propagation: how the relevance of an operation's result is shared by its inputs.

Relevance R is a tensor in the shape of what it is about. Each rule takes the inputs of one operation and the relevance
of its output, and gives the relevance of each input. Sources: Bach et al., PLoS ONE 2015 (z and alpha-beta rules);
Montavon et al., Pattern Recognition 2017 (bounded inputs); Chefer, Gur and Wolf, CVPR 2021, eq. 1-9 (attention, and
the normalised sum).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .attention import AttentionOperands, row_tiles
from .modified_backward import with_transpose

_STABILISER = 1e-9


def share(relevance: Tensor, total: Tensor) -> Tensor:
    """Relevance for each unit of a total, R / z; where z is 0 nothing is shared, and R is lost.

    The stabiliser 1e-9 is added to z whatever its sign, as in the released code of Chefer et al.
    """
    divisor = total + _STABILISER
    return torch.where((total == 0) | (divisor == 0), 0.0, relevance / divisor)


def linear_alpha_beta(state: Tensor, weight: Tensor, relevance: Tensor, alpha: float = 1.0) -> Tensor:
    r"""The alpha-beta rule of a linear map, its bias left out; alpha = 1 is the z⁺ rule (Bach et al., eq. 60).

    .. math:: R_i = \sum_j \Bigl(\alpha \frac{(x_i w_{ji})^+}{\sum_k (x_k w_{jk})^+}
        - \beta \frac{(x_i w_{ji})^-}{\sum_k (x_k w_{jk})^-}\Bigr) R_j, \qquad \beta = \alpha - 1

    Args:
        state: x (…, D).
        weight: w (E, D).
        relevance: R_j (…, E).
        alpha: >= 1, how much of the relevance positive contributions take.

    Returns:
        R_i (…, D); its sum is that of `relevance`, up to outputs to which nothing contributes.
    """
    positive = _linear_share(state, weight.clamp(min=0), weight.clamp(max=0), relevance)
    if alpha == 1:
        return positive
    return alpha * positive - (alpha - 1) * _linear_share(state, weight.clamp(max=0), weight.clamp(min=0), relevance)


def _linear_share(state: Tensor, above: Tensor, below: Tensor, relevance: Tensor) -> Tensor:
    """What contributions x⁺ · above + x⁻ · below get."""
    positive, negative = state.clamp(min=0), state.clamp(max=0)
    unit = share(relevance, positive @ above.T + negative @ below.T)
    return positive * (unit @ above) + negative * (unit @ below)


def linear_signs_apart(state: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    r"""The z⁺ rule as the LRP baselines of Chefer et al. compute it, with x⁺w⁺ and x⁻w⁻ each over a total of its own.

    .. math:: R_i = \sum_j \Bigl(\frac{x_i^+ w_{ji}^+}{\sum_k x_k^+ w_{jk}^+}
        + \frac{x_i^- w_{ji}^-}{\sum_k x_k^- w_{jk}^-}\Bigr) R_j

    Each of the two takes all the relevance, so the sum of R_i is up to twice that of R_j. Shapes as for
    `linear_alpha_beta`.
    """
    above, below = weight.clamp(min=0), weight.clamp(max=0)
    positive, negative = state.clamp(min=0), state.clamp(max=0)
    return positive * (share(relevance, positive @ above.T) @ above) + negative * (
        share(relevance, negative @ below.T) @ below
    )


def addition(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The z rule of a sum: each summand gets its part of the total, entry by entry; all tensors of one shape."""
    total = left + right
    unit = share(_read(total, relevance), total)
    return left * unit, right * unit


def normalised_addition(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    r"""The z rule of a sum, rescaled so that neither summand gets more than there is (Chefer et al., eq. 9).

    .. math:: R^{(u)} \leftarrow R^{(u)}\, \frac{|\sum R^{(u)}|}{|\sum R^{(u)}| + |\sum R^{(v)}|}
        \cdot \frac{\sum R}{\sum R^{(u)}}

    Args:
        left: (G, …), one entry of the first axis an image, over whose axes the sums go.
        right: the same shape.
        relevance: the same shape.
    """
    parts = addition(left, right, relevance)
    axes = tuple(range(1, relevance.ndim))
    sums = [part.sum(axes, keepdim=True) for part in parts]
    magnitude = sums[0].abs() + sums[1].abs()
    total = _read(left + right, relevance).sum(axes, keepdim=True)
    first, second = (
        part * share(share(each.abs(), magnitude) * total, each) for part, each in zip(parts, sums, strict=True)
    )
    return first, second


def _read(state: Tensor, relevance: Tensor) -> Tensor:
    """What a state gathers from all that reads it: R z / z, stabilised, as the released code copies states."""
    return state * share(relevance, state)


def linear_map(apply: Callable[[Tensor], Tensor], state: Tensor, relevance: Tensor) -> Tensor:
    """The z rule of a linear map without bias: x times the transpose of the map on R / z."""
    total, back = with_transpose(apply, state)
    return state * back(share(relevance, total))[0]


def product(apply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, relevance: Tensor) -> list[Tensor]:
    """The rule of a product of two states, each linear in it: the z rule, half for each factor."""
    total, back = with_transpose(apply, left, right)
    unit = back(share(relevance, total) / 2)
    return [left * unit[0], right * unit[1]]


def attention(operands: AttentionOperands, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of q, k, v (B, H, N, dh) from that of O = A v.

    Half goes to v and half to A; what reaches A passes the softmax, the scale and the bias as it is, and is halved
    again between q and k. Tile by tile; nothing N×N is held.
    """
    q, k, v = operands.q, operands.k, operands.v
    of_q = torch.empty_like(q)
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    for rows in row_tiles(operands):
        weights, queries = operands.probabilities(rows), q[:, :, rows]
        unit = share(relevance[:, :, rows], weights @ v) / 2
        of_v += weights.mT @ unit
        of_weights = weights * (unit @ v.mT)
        unit = share(of_weights, queries @ k.mT) / 2
        of_q[:, :, rows] = queries * (unit @ k)
        of_k += unit.mT @ queries
    return of_q, k * of_k, v * of_v


def bounded_convolution(apply: Callable[..., Tensor], pixels: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    r"""The rule of a first layer on pixels between the lowest l and the highest h of their image (Montavon et al.).

    .. math:: R_i = \sum_j \frac{x_i w_{ij} - l w_{ij}^+ - h w_{ij}^-}
        {\sum_k (x_k w_{kj} - l w_{kj}^+ - h w_{kj}^-)} R_j

    Args:
        apply: the convolution without bias, of pixels (B, C, H, W) and `weight`.
        pixels: x (B, C, H, W).
        weight: w.
        relevance: R_j, in the shape of its result.
    """
    lowest = pixels.amin((1, 2, 3), keepdim=True).expand_as(pixels)
    highest = pixels.amax((1, 2, 3), keepdim=True).expand_as(pixels)
    parts = ((pixels, weight), (-lowest, weight.clamp(min=0)), (-highest, weight.clamp(max=0)))
    maps = [with_transpose(functools.partial(apply, weight=kernel), state) for state, kernel in parts]
    unit = share(relevance, sum((total for total, _ in maps), torch.zeros_like(relevance)))
    return sum(
        (state * back(unit)[0] for (state, _), (_, back) in zip(parts, maps, strict=True)),
        torch.zeros_like(pixels),
    )
