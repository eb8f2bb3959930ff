"""Rules of layer-wise relevance propagation for linear maps, in the form of gradients.

Relevance is written as input times a modified gradient, R = x · g, so that a rule is a pullback of g: with z = W x + b,
R_j = z_j g_j comes in and R_i = x_i g_i goes out (Montavon et al., Layer-Wise Relevance Propagation, 2019; Achtibat et
al., AttnLRP, ICML 2024, eq. 3-8). Without stabiliser and γ that is the plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .balanced import BalancedGradients
from .modified_backward import Function, Rule, on_graph, refuse, with_pullback, with_transpose

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""A map of state, weight and bias that is linear in the state but for the bias."""


@dataclass(frozen=True)
class AttnLRPRules(BalancedGradients):
    """The rules of AttnLRP: those of balanced gradients, and a rule for linear maps.

    Attributes:
        epsilon: stabiliser ε of the ε rule.
        gamma: γ of linear layers; 0 is the ε rule.
        conv_gamma: γ of convolutions.
    """

    epsilon: float = 1e-8
    gamma: float = 0.0
    conv_gamma: float = 0.0

    def rules(self) -> dict[Function, Rule]:
        """A rule for each torch function that has one."""
        convolution = dict.fromkeys((F.conv2d, torch.conv2d), self._convolution)
        return super().rules() | {F.linear: self._linear} | convolution

    def _linear(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        return self._map(func, ("input", "weight", "bias"), self.gamma, args, named)

    def _convolution(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        return self._map(func, names, self.conv_gamma, args, named)

    def _map(
        self, func: Function, names: Sequence[str], gamma: float, args: Sequence[Any], named: dict[str, Any]
    ) -> Tensor:
        settings = dict(zip(names, args, strict=False)) | named
        state, weight, bias = settings.pop("input"), settings.pop("weight"), settings.pop("bias", None)
        if on_graph(weight) or on_graph(bias):
            raise refuse(func, "AttnLRP with a weight that depends on the image", "Use generic_attention or rollout")

        def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            result: Tensor = func(x, w, b, **settings)
            return result

        def pullback(gradient: Tensor) -> tuple[Tensor]:
            # in a caller's autocast these are in half precision, and a backward pass is not in autocast
            held, gradient = state.detach().to(weight.dtype), gradient.to(weight.dtype)
            if gamma == 0:
                return (epsilon_gradient(apply, held, weight, bias, gradient, self.epsilon),)
            return (gamma_gradient(apply, held, weight, bias, gradient, gamma, self.epsilon),)

        return with_pullback(lambda: apply(state, weight, bias), pullback, state)


def epsilon_gradient(
    apply: Linear, state: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor, epsilon: float
) -> Tensor:
    r"""The ε rule as a pullback.

    .. math:: R_i = \sum_j \frac{x_i w_{ji}}{z_j + \epsilon\,\mathrm{sign} z_j} R_j, \qquad z = Wx + b

    Args:
        apply: the map.
        state: x.
        weight: W.
        bias: b, which takes its part of the relevance.
        gradient: g_j = R_j / z_j, in the shape of z.
        epsilon: ε >= 0.

    Returns:
        g_i = R_i / x_i, in the shape of x.
    """
    if epsilon > 0:
        magnitude = apply(state, weight, bias).abs()
        if magnitude.dtype in (torch.float16, torch.bfloat16):
            magnitude = magnitude.float()  # in which ε is not zero
        gradient = gradient * (magnitude / (magnitude + epsilon)).to(gradient.dtype)
    return _transposed(apply, state, weight, gradient)


def gamma_gradient(
    apply: Linear,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient: Tensor,
    gamma: float,
    epsilon: float,
) -> Tensor:
    r"""The γ rule for states of both signs as a pullback: contributions of the output's own sign count 1 + γ times.

    .. math:: R_i = \sum_j \frac{x_i w_{ji} + \gamma\,(x_i w_{ji})^{s}}
        {z_j + \gamma \bigl(\sum_k (x_k w_{jk})^{s} + b_j^{s}\bigr)} R_j, \qquad s = \mathrm{sign} z_j

    where (·)^s keeps what has that sign. Arguments and result as for `epsilon_gradient`.
    """
    total = apply(state, weight, bias)
    positive, negative = state.clamp(min=0), state.clamp(max=0)
    above, below = weight.clamp(min=0), weight.clamp(max=0)
    result = torch.zeros_like(state)
    for sign, same, other in ((1, above, below), (-1, below, above)):
        own = None if bias is None else bias.clamp(min=0) if sign > 0 else bias.clamp(max=0)
        extra = apply(positive, same, own) + apply(negative, other, None)
        denominator = total + gamma * extra + sign * epsilon
        unit = torch.where(sign * total > 0, total * gradient / denominator, 0.0)
        result += _transposed(apply, state, weight, unit)
        result += gamma * torch.where(state > 0, _transposed(apply, state, same, unit), 0.0)
        result += gamma * torch.where(state < 0, _transposed(apply, state, other, unit), 0.0)
    return result


def _transposed(apply: Linear, state: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The transpose of the map on a tensor in the shape of its result."""
    if weight.ndim == 2:  # a matrix: needs no forward of its own
        return gradient @ weight
    _, transpose = with_transpose(lambda x: apply(x, weight, None), state)
    return transpose(gradient)[0]
