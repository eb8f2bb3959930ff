"""Balanced gradients: what rescales a state in the forward is held constant in the backward pass.

A normalised or gated state is a factor times a state, and the plain derivative also follows the factor: a longer token
is divided by its own length, and its gradient along itself vanishes. With the factors held constant, each of these
layers is linear in its state for one image, so that input times gradient adds up to the output but for biases (Mehri et
al., LibraGrad, CVPR 2025; Ali et al., XAI for Transformers, ICML 2022, for LayerNorm and attention):

* LayerNorm and RMSNorm: the denominator is constant, the mean is not;
* GELU, SiLU and their like, x · gate(x): the gate is constant;
* attention A v: A is constant, and its gradient is still dy/dO · vᵀ where a method reads it;
* a product of two states, as in gated feed-forward layers: half to each factor.

The forward is the model's own, bit for bit; only `nn.MultiheadAttention`, which hides its attention, is computed from
its parts, and may round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import widen
from .layout import Arrangement
from .modified_backward import (
    DIVIDE,
    GATE,
    MATRIX_PRODUCT,
    MULTIPLY,
    RMS_NORM,
    SOFTMAX,
    BackwardRules,
    Function,
    ModifiedBackward,
    Rule,
    on_graph,
    refuse,
    scaled_gradient,
    with_pullback,
)
from .tap import SDPA_SIGNATURE

_GATED: dict[Function, float] = {F.gelu: 0.5, F.silu: 0.5, F.hardswish: 0.5, F.mish: 0.6}
"""Activations x · gate(x), and gate(0)."""

_POWER: frozenset[Function] = frozenset({torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square})

_SCALES: frozenset[Function] = frozenset(
    {
        *(torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.reciprocal, Tensor.reciprocal),
        *(torch.std, Tensor.std, torch.var, Tensor.var),
        *(torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm),
    }
)
"""What makes the denominator of a norm that is written by hand."""

_BENT: frozenset[Function] = frozenset(
    {
        *(torch.tanh, Tensor.tanh, F.tanh, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.sin, torch.cos),
        *(F.softplus, F.elu, F.selu, F.celu, F.hardsigmoid, F.glu, F.relu6, F.hardtanh, F.cosine_similarity),
        *(F.group_norm, F.instance_norm, F.local_response_norm, Tensor.mul_, Tensor.div_),
    }
)
"""What is neither linear nor of a kind above, as far as models are known to use it: refused."""


@dataclass(frozen=True)
class BalancedGradients(BackwardRules):
    """The rules of the module.

    Attributes:
        split_attention: A is no constant: products of states share, also that of attention and values and that of
            queries and keys, and the softmax has its derivative.
    """

    split_attention: bool = False

    def watching(self, batch: int, arrangement: Arrangement) -> ModifiedBackward:
        """The mode that applies the rules."""
        return ModifiedBackward(self.rules())

    def rules(self) -> dict[Function, Rule]:
        """A rule for each torch function that has one."""
        rules: dict[Function, Rule] = {F.layer_norm: _layer_norm, F.normalize: _normalize}
        rules |= dict.fromkeys(RMS_NORM, _rms_norm)
        rules |= dict.fromkeys(_GATED, _gated)
        rules |= dict.fromkeys(GATE | _SCALES, _constant)
        rules |= dict.fromkeys(DIVIDE, _divide)
        rules |= dict.fromkeys(_POWER, _power)
        rules |= dict.fromkeys(MULTIPLY, _halved)
        rules |= dict.fromkeys(_BENT, _refused)
        rules[Tensor.__imul__] = lambda _, args, named: _halved(torch.mul, args, named)
        if self.split_attention:
            rules |= dict.fromkeys(MATRIX_PRODUCT, _halved)
            return rules | {torch.einsum: _halved_einsum, F.scaled_dot_product_attention: _split_attention}
        return rules | dict.fromkeys(SOFTMAX, _constant) | {F.scaled_dot_product_attention: _constant_attention}


BALANCED = BalancedGradients()
"""The rules of a method that follows balanced gradients."""


def _layer_norm(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    def centred(state: Tensor, axes: tuple[int, ...]) -> Tensor:
        return state - state.mean(axes, keepdim=True)

    return _norm(("input", "normalized_shape", "weight", "bias", "eps"), centred, func, args, named)


def _rms_norm(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    return _norm(("input", "normalized_shape", "weight", "eps"), lambda state, _: state, func, args, named)


def _norm(
    names: Sequence[str],
    centred: Callable[[Tensor, tuple[int, ...]], Tensor],
    func: Function,
    args: Sequence[Any],
    named: dict[str, Any],
) -> Tensor:
    """x minus what `centred` takes off, over a denominator that is held constant, times a weight."""
    given = dict(zip(names, args, strict=False)) | named
    state, weight = given["input"], given.get("weight")
    axes = tuple(range(-len(given["normalized_shape"]), 0))

    def pullback(gradient: Tensor) -> tuple[Tensor]:
        wide = centred(widen(state.detach()), axes)
        epsilon = given.get("eps")
        if epsilon is None:
            epsilon = 1e-5 if func is F.layer_norm else torch.finfo(state.dtype).eps
        weighted = widen(gradient) if weight is None else widen(gradient) * widen(weight.detach())
        scaled = weighted * (wide.square().mean(axes, keepdim=True) + epsilon).rsqrt()
        return (centred(scaled, axes).to(state.dtype),)

    return with_pullback(lambda: func(*args, **named), pullback, state)


def _normalize(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    given = {"p": 2.0, "dim": 1, "eps": 1e-12} | dict(zip(("input", "p", "dim", "eps"), args, strict=False)) | named
    state = given["input"]

    def pullback(gradient: Tensor) -> tuple[Tensor]:
        length = state.detach().norm(given["p"], given["dim"], keepdim=True).clamp(min=given["eps"])
        return (gradient / length,)

    return with_pullback(lambda: func(*args, **named), pullback, state)


def _gated(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    state, *others = args or [named.pop("input")]
    if func is not F.gelu:  # never in place
        others, named = [], {}
    with torch.no_grad():
        value: Tensor = func(state, *others, **named)
        gate = (value / state).nan_to_num_(nan=_GATED[func])  # 0 / 0
    return with_pullback(lambda: value, lambda gradient: (gradient * gate,), state)


def _constant(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    with torch.no_grad():
        return func(*args, **named)


def _constant_attention(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    call = SDPA_SIGNATURE.bind(*args, **named).arguments
    return func(**{name: _detached(each) if name != "value" else each for name, each in call.items()})


def _split_attention(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    call = SDPA_SIGNATURE.bind(*args, **named).arguments
    shares = {"query": 1 / 4, "key": 1 / 4, "value": 1 / 2}
    return func(
        **{name: scaled_gradient(each, shares[name]) if name in shares else each for name, each in call.items()}
    )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _divide(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    dividend, divisor = args
    return func(dividend, _detached(divisor), **named)


def _halved(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    left, right = args
    if not (on_graph(left) and on_graph(right)):
        return func(left, right, **named)
    return func(scaled_gradient(left, 0.5), scaled_gradient(right, 0.5), **named)


def _power(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """A product of equal factors: each gets an equal share."""
    state, exponent = args if len(args) > 1 else (args[0], named.get("exponent", 2))
    if isinstance(exponent, Tensor) or exponent <= 0:
        return _refused(func, args, named)
    return func(scaled_gradient(state, 1 / exponent), *args[1:], **named)


def _halved_einsum(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    equation, *operands = args
    if not all(on_graph(each) for each in operands):
        return func(*args, **named)
    return func(equation, *(scaled_gradient(each, 1 / len(operands)) for each in operands), **named)


def _refused(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
    raise refuse(func, "a balanced backward pass", "Use gradient='plain', or a method without gradients: rollout")
