"""The rules of layer-wise relevance propagation: how the relevance of an operation's result is shared by its inputs.

Relevance R is a tensor in the shape of what it is about. Each rule takes the inputs of one operation and the relevance
of its output, and gives the relevance of each input. Sources: Bach et al., PLoS ONE 2015 (z and alpha-beta rules);
Montavon et al., Pattern Recognition 2017 (bounded inputs); Chefer, Gur and Wolf, CVPR 2021, eq. 1-9 (attention, and
the normalised sum).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .attention import AttentionOperands, row_tiles
from .double_precision import Scratch
from .modified_backward import with_transpose

_STABILISER = 1e-9
_FAR = 1e15  # so far from 1 single precision can square a number
_ROWS = 512  # at a time on the CPU: what is made of more leaves the cache, and asks for memory anew
_CANCELLED = 1e-2  # what share of all sizes a total has to be, to be taken as a difference of two


def share(relevance: Tensor, total: Tensor) -> Tensor:
    """Relevance for each unit of a total of the same shape, R / z; where z is 0 nothing is shared, and R is lost.

    The stabiliser 1e-9 is added to z whatever its sign, as in the released code of Chefer et al.
    """
    divisor = total + _STABILISER
    nothing = (total == 0).logical_or_(divisor == 0)
    if nothing.any():
        divisor.masked_fill_(nothing, math.inf)
    return torch.div(relevance, divisor, out=divisor) if relevance.dtype == divisor.dtype else relevance / divisor


def linear_alpha_beta(
    state: Tensor,
    weight: Tensor,
    relevance: Tensor,
    alpha: float = 1.0,
    *,
    output: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    r"""The alpha-beta rule of a linear map, its bias left out; alpha = 1 is the z⁺ rule (Bach et al., eq. 60).

    .. math:: R_i = \sum_j \Bigl(\alpha \frac{(x_i w_{ji})^+}{\sum_k (x_k w_{jk})^+}
        - \beta \frac{(x_i w_{ji})^-}{\sum_k (x_k w_{jk})^-}\Bigr) R_j, \qquad \beta = \alpha - 1

    Args:
        state: x (…, D), in the precision of the weight.
        weight: w (E, D). Products are in its precision: each total is one of contributions of one sign.
        relevance: R_j (…, E), of any precision.
        alpha: >= 1, how much of the relevance positive contributions take.
        output: x wᵀ (…, E) in the precision of the weight, where it is known; saves one product of four.
        scratch: memory for what lies between.

    Returns:
        R_i (…, D), as wide as `relevance`; its sum is that of `relevance`, up to outputs to which nothing contributes.
    """
    scratch = scratch or Scratch()
    weights = weight, torch.abs(weight, out=scratch.like(weight, "size of weight"))

    def rule(relevance: Tensor, state: Tensor, output: Tensor) -> Tensor:
        positive = _positive_share(state, *weights, output, relevance, scratch)
        if alpha == 1:
            return positive
        positive = alpha * positive
        return positive - (alpha - 1) * _positive_share(-state, *weights, -output, relevance, scratch)

    return _by_rows(rule, scratch, relevance, state, state @ weight.T if output is None else output)


def _positive_share(
    state: Tensor, weight: Tensor, weight_size: Tensor, output: Tensor, relevance: Tensor, scratch: Scratch
) -> Tensor:
    """What positive contributions of states (T, D) get of the relevance (T, E); the z⁺ rule.

    A positive part is the mean of a number and its size, and so are sums of them: Σ (xw)⁺ = (Σ xw + Σ |x||w|) / 2. That
    is one product where the output is known, and where the positive contributions cancel in it, two others are exact.
    """
    state_size = torch.abs(state, out=scratch.like(state, "size"))
    sizes = torch.mm(state_size, weight_size.T, out=scratch.like(output, "sizes"))
    certain = torch.add(output, sizes, alpha=1 - 2 * _CANCELLED, out=scratch.like(output, "certain"))
    if certain.amin() >= 0:
        unit = torch.div(relevance, sizes.add_(output).add_(2 * _STABILISER), out=sizes)  # half of R / Σ (xw)⁺
        back = torch.mm(unit, weight_size, out=scratch.like(state, "back"))
        return state_size.mul_(back).addcmul_(state, torch.mm(unit, weight, out=back))
    positive, negative, above, below = state.clamp(min=0), state.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
    unit = share(relevance, (positive @ above.T).addmm_(negative, below.T))
    return positive.mul_(unit @ above).addcmul_(negative, unit @ below)


def _by_rows(rule: Callable[..., Tensor], scratch: Scratch, relevance: Tensor, *states: Tensor) -> Tensor:
    """A rule of a linear map, on the rows (T, …) of relevance and states where there is any relevance.

    Relevance may be of any magnitude, and single precision is not: rows that are far from 1 are brought to length 1.
    """
    rows, kept = relevance.flatten(0, -2), [each.flatten(0, -2) for each in states]
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    some = length[:, 0].nonzero()[:, 0]
    if len(some) == 0:
        return rows.new_zeros(states[0].shape)
    if len(some) < len(rows):
        shared = _by_rows(rule, scratch, rows[some], *(each[some] for each in kept))
        return rows.new_zeros(kept[0].shape).index_copy_(0, some, shared).view(states[0].shape)
    near = length.amin() > 1 / _FAR and length.amax() < _FAR
    result = rows.new_empty(kept[0].shape)
    count = _ROWS if rows.device.type == "cpu" else len(rows)
    for place, scale, arrived, *own in zip(*(each.split(count) for each in (result, length, rows, *kept)), strict=True):
        held = scratch.like(arrived, "relevance", kept[0].dtype)
        shared = rule(held.copy_(arrived) if near else torch.div(arrived, scale, out=held), *own)
        place.copy_(shared)
        if not near:
            place.mul_(scale)
    return result.view(states[0].shape)


def linear_signs_apart(state: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    r"""The z⁺ rule as the LRP baselines of Chefer et al. compute it, with x⁺w⁺ and x⁻w⁻ each over a total of its own.

    .. math:: R_i = \sum_j \Bigl(\frac{x_i^+ w_{ji}^+}{\sum_k x_k^+ w_{jk}^+}
        + \frac{x_i^- w_{ji}^-}{\sum_k x_k^- w_{jk}^-}\Bigr) R_j

    Each of the two takes all the relevance, so the sum of R_i is up to twice that of R_j. Shapes as for
    `linear_alpha_beta`.
    """
    above, below = weight.clamp(min=0), weight.clamp(max=0)

    def rule(relevance: Tensor, state: Tensor) -> Tensor:
        positive, negative = state.clamp(min=0), state.clamp(max=0)
        of_positive = share(relevance, positive @ above.T) @ above
        return positive.mul_(of_positive).addcmul_(negative, share(relevance, negative @ below.T) @ below)

    return _by_rows(rule, Scratch(), relevance, state)


def addition(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """The z rule of a sum: each summand gets its part of the total, entry by entry; all tensors of one shape."""
    unit, _ = _units_of_sum(left + right, relevance)
    return left * unit, unit.mul_(right)


def normalised_addition(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    r"""The z rule of a sum, rescaled so that neither summand gets more than there is (Chefer et al., eq. 9).

    .. math:: R^{(u)} \leftarrow R^{(u)}\, \frac{|\sum R^{(u)}|}{|\sum R^{(u)}| + |\sum R^{(v)}|}
        \cdot \frac{\sum R}{\sum R^{(u)}}

    Args:
        left: (G, n), one row an image, over which the sums go; image by image, so that each stays in the cache.
        right: the same shape.
        relevance: the same shape.
    """
    first, second = torch.empty_like(relevance), torch.empty_like(relevance)
    for image in range(len(relevance)):
        summands = left[image], right[image]
        unit, of_total = _units_of_sum(summands[0] + summands[1], relevance[image])
        sums = [summand.dot(unit) for summand in summands]
        magnitude = sums[0].abs() + sums[1].abs()
        for part, summand, each in zip((first, second), summands, sums, strict=True):
            factor = share(share(each.abs(), magnitude) * of_total.sum(), each)
            torch.mul(summand, unit, out=part[image]).mul_(factor)
    return first, second


def _units_of_sum(total: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance for each unit of a sum z, and what z has: R z / z, stabilised, as the released code copies states.

    Where z is 0 it has nothing.
    """
    divisor = total + _STABILISER
    divisor.masked_fill_(divisor == 0, math.inf)
    read = (relevance / divisor).mul_(total)
    return read / divisor, read


def linear_map(apply: Callable[[Tensor], Tensor], state: Tensor, relevance: Tensor) -> Tensor:
    """The z rule of a linear map without bias: x times the transpose of the map on R / z."""
    total, back = with_transpose(apply, state)
    return state * back(share(relevance, total))[0]


def product(apply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, relevance: Tensor) -> list[Tensor]:
    """The rule of a product of two states, each linear in it: the z rule, half for each factor."""
    total, back = with_transpose(apply, left, right)
    unit = back(share(relevance, total) / 2)
    return [left * unit[0], right * unit[1]]


def attention(operands: AttentionOperands, output: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of q, k, v (B, H, N, dh) from that of O = A v.

    Half goes to v and half to A; what reaches A passes the softmax, the scale and the bias as it is, and is halved
    again between q and k. Tile by tile; nothing N×N is held.

    Args:
        operands: q, k, v.
        output: O (B, H, N, dh).
        relevance: the same shape.
    """
    # batches and heads apart from each other in memory would be copied for each tile anew
    q, k, v = operands.q.contiguous(), operands.k.contiguous(), operands.v.contiguous()
    operands = replace(operands, q=q, k=k, v=v)
    of_q = torch.empty_like(q)
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    unit_of_output = share(relevance, output).div_(2).contiguous()
    for rows in row_tiles(operands):
        weights, queries, unit = operands.probabilities(rows), q[:, :, rows], unit_of_output[:, :, rows]
        of_v.flatten(0, 1).baddbmm_(weights.mT.flatten(0, 1), unit.flatten(0, 1))
        of_weights = weights.mul_(unit @ v.mT)
        unit = share(of_weights, queries @ k.mT).div_(2)
        of_q[:, :, rows] = queries * (unit @ k)
        of_k.flatten(0, 1).baddbmm_(unit.mT.flatten(0, 1), queries.flatten(0, 1))
    return of_q, k * of_k, v * of_v


def attention_of_heads(operands: AttentionOperands, output: Tensor, relevance: Tensor) -> tuple[Tensor, ...]:
    """The same where all tensors are of single heads (B·H, N, dh), and a bias may be of each."""
    bias = operands.bias
    bias = bias[None] if bias is not None and bias.ndim == 3 else bias
    stacked = replace(operands, q=operands.q[None], k=operands.k[None], v=operands.v[None], bias=bias)
    return tuple(part[0] for part in attention(stacked, output[None], relevance[None]))


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
