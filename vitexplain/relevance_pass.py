"""Layer-wise relevance propagation through a borrowed model: relevance travels down the autograd graph of one forward.

Every operation of the forward that depends on the image has a pullback that is a rule of `relevance_rules`; where
entries are only moved, autograd's own is one. What arrives at a tensor is then its relevance. An operation without
a rule is refused, so that no relevance comes of a rule that does not hold.

Relevance is divided by activations that cross zero, and single precision cannot tell on which side they lie. The
forward runs in double precision for it, where the device has it: parameters are widened as they are used, one at a
time, and no copy of the model is held. The normalised rule of linear maps, which divides by sums of one sign, is in the
precision of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import relevance_rules
from .double_precision import Scratch, wide, widely, writes_in_place
from .errors import UnsupportedModelError
from .layout import Arrangement
from .linear_products import LinearProducts
from .modified_backward import (
    DIVIDE,
    GATE,
    MATRIX_PRODUCT,
    MULTIPLY,
    RMS_NORM,
    SOFTMAX,
    Function,
    ModifiedBackward,
    Rule,
    linear_arguments,
    on_graph,
    refuse,
    with_pullback,
)
from .tap import SDPA_SIGNATURE, attention_operands

_MOVING: frozenset[Function] = frozenset(
    {
        *(F.dropout, F.unfold, F.pad, torch.dropout, torch.cat, torch.concat, torch.concatenate, torch.stack),
        *(Tensor.__getitem__, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.to, Tensor.float, Tensor.double),
        *(Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.repeat),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
        *(
            getattr(owner, name)
            for name in (
                *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes"),
                *("movedim", "unbind", "chunk", "split", "select", "narrow", "roll", "flip", "index_select", "gather"),
                *("view", "expand", "masked_fill", "t", "repeat_interleave"),
            )
            for owner in (torch, Tensor)
            if hasattr(owner, name)
        ),
    }
)
"""What moves, repeats or leaves out entries: relevance goes the way back that a gradient goes."""

_PASSING: frozenset[Function] = frozenset(
    {
        *(F.layer_norm, F.normalize, F.gelu, F.silu, F.relu, torch.relu, Tensor.relu),
        *(torch.neg, Tensor.neg, Tensor.__neg__),
        *RMS_NORM,
        *SOFTMAX,
    }
)
"""What passes relevance on as it is."""

_ADD: frozenset[Function] = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
_SUBTRACT: frozenset[Function] = frozenset({torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__})
_LINEAR_MAPS: frozenset[Function] = frozenset(
    {torch.mean, Tensor.mean, torch.sum, Tensor.sum, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d}
)
_CAST: frozenset[Function] = frozenset(
    {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.type}
)
ALTERNATIVES = "Methods that need no such rules work: generic_attention, rollout, gradcam"
"""What to say where there is no rule."""


class RelevancePass(ModifiedBackward):
    """Gives every operation of a forward its rule; see the module.

    Args:
        batch: number of images.
        arrangement: the axes of a token state inside the model.
        alpha: of the alpha-beta rule of linear maps.
        normalised: the rules of Chefer et al.; else those of their LRP baselines.
    """

    def __init__(self, batch: int, arrangement: Arrangement, *, alpha: float, normalised: bool) -> None:
        self._batch, self._arrangement = batch, arrangement
        self._scratch = Scratch()
        self.products: LinearProducts = LinearProducts()
        self._alpha, self._normalised = alpha, normalised
        rules: dict[Function, Rule] = dict.fromkeys(_PASSING, _pass)
        rules |= dict.fromkeys(GATE, _hold)
        rules |= dict.fromkeys(_ADD, self._add)
        rules |= dict.fromkeys(_SUBTRACT, self._subtract) | {Tensor.add_: self._add_in_place}
        rules |= dict.fromkeys(MULTIPLY, _multiply)
        rules |= dict.fromkeys(DIVIDE, _divide)
        rules |= dict.fromkeys(_LINEAR_MAPS, _linear_map)
        super().__init__(rules | {F.scaled_dot_product_attention: _attention})
        # what may have a weight keeps it as it is, for a pullback must not hold on to a wide one
        self._weighed: dict[Function, Rule] = dict.fromkeys(MATRIX_PRODUCT, self._matrix_product)
        self._weighed |= {F.linear: self._linear, F.conv2d: _convolution, torch.conv2d: _convolution}

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _CAST and isinstance(args[0], Tensor) and args[0].is_floating_point():
            moved = func(*args, **named)
            return args[0].to(moved.device) if moved.is_floating_point() else moved
        if func in SOFTMAX:
            named = {**named, "dtype": None}
        return super().__torch_function__(func, types, args, named)

    def below(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """One call on tensors that are no part of the graph."""
        return func(*args, **named) if writes_in_place(func) else widely(func, args, named)

    def call(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """One call on tensors of the graph, by its rule."""
        if func in self._weighed:
            return self._weighed[func](func, args, named)
        if func in self.rules:
            return self.rules[func](func, wide(args), wide(named))
        result = widely(func, args, named)
        if func not in _MOVING and on_graph(result):
            raise _refused(func)
        return result

    def _linear(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        state, weight, bias = linear_arguments(args, named)
        if on_graph(weight):
            raise _refused(func)
        return self._linear_map(state, weight, bias)

    def _linear_map(self, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x wᵀ + b in double precision; the normalised rule is in that of the weight, since signs are settled."""
        # the sums of the other rules are not normalised, and magnify what rounding leaves
        precision = torch.promote_types(weight.dtype, torch.float32) if self._normalised else wide(weight).dtype
        with torch.no_grad():
            output = F.linear(wide(state), self._scratch.wide(weight))
            product = output.to(precision, copy=True) if self._normalised else None
            output = output if bias is None else output.add_(bias)
        if product is not None:
            self.products.keep(state, weight, product)
        held = state.detach().to(precision, copy=True)  # the model may go on to change the state in place

        def pullback(relevance: Tensor) -> tuple[Tensor]:
            if self._normalised:
                alpha_beta = relevance_rules.linear_alpha_beta
                shared = alpha_beta(
                    held, weight.to(precision), relevance, self._alpha, output=product, scratch=self._scratch
                )
                return (shared,)
            return (relevance_rules.linear_signs_apart(held, weight.to(precision), relevance),)

        return with_pullback(lambda: output, pullback, state)

    def _matrix_product(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        left, right = args
        if right.ndim == 2 and not on_graph(right):  # a linear map that is written as a product
            return self._linear_map(left, right.T, None)
        return _product(func, wide(left), wide(right))

    def _add(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        return self._sum(torch.add, *args[:2], **named)

    def _add_in_place(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        state: Tensor = args[0]
        return state.copy_(self._sum(torch.add, state.clone(), *args[1:2], **named))

    def _subtract(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
        return self._sum(torch.sub, *args[:2], **named)

    def _sum(self, func: Function, left: Any, right: Any, alpha: float = 1) -> Tensor:
        """left ± alpha · right, where each is a tensor or a number.

        A summand that does not depend on the image takes its part of a token state's relevance; elsewhere, as within
        attention, it is a bias and takes nothing.
        """
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return _pass(lambda _: func(left, right, alpha=alpha), [left if isinstance(left, Tensor) else right], {})
        if max(left.ndim, right.ndim) != len(self._arrangement) and not (on_graph(left) and on_graph(right)):
            return _pass(lambda _: func(left, right, alpha=alpha), [left if on_graph(left) else right], {})
        factor = alpha if func is torch.add else -alpha

        def pullback(relevance: Tensor) -> tuple[Tensor, Tensor]:
            summand, other = (each.detach().expand_as(relevance) for each in (left, right))
            other = other if factor == 1 else factor * other
            first, second = self._shared(summand, other, relevance)
            return first.sum_to_size(left.shape), second.sum_to_size(right.shape)

        return with_pullback(lambda: func(left, right, alpha=alpha), pullback, left, right)

    def _shared(self, left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        if not self._normalised:
            return relevance_rules.addition(left, right, relevance)
        axis = self._arrangement.index("B") if relevance.ndim == len(self._arrangement) else 0
        moved = relevance.movedim(axis, 0)
        parts = relevance_rules.normalised_addition(
            *(each.movedim(axis, 0).reshape(self._batch, -1) for each in (left, right, relevance))
        )
        first, second = (part.reshape(moved.shape).movedim(0, axis) for part in parts)
        return first, second


def _refused(func: Function) -> UnsupportedModelError:
    return refuse(func, "layer-wise relevance propagation", ALTERNATIVES)


def _pass(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    """Relevance as it is, to the one state that the function takes."""
    state, *others = args or [named.pop("input")]
    if func in (F.relu, F.silu):  # never in place
        others, named = [], {}
    return with_pullback(
        lambda: func(state, *others, **named), lambda relevance: (relevance.sum_to_size(state.shape),), state
    )


def _hold(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    held: Tensor = func(*args, **named)
    return held.detach()


def _multiply(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    left, right = args
    if on_graph(left) and on_graph(right):
        return _product(func, left, right)
    if on_graph(left):
        return _pass(lambda state: func(state, right), [left], {})
    return _pass(lambda state: func(left, state), [right], {})


def _divide(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    """All relevance to the dividend: the divisor is a scale."""
    dividend, divisor = args
    if not on_graph(dividend):
        raise _refused(func)
    return _pass(lambda state: func(state, divisor, **named), [dividend], {})


def _product(func: Function, left: Tensor, right: Tensor) -> Tensor:
    def pullback(relevance: Tensor) -> tuple[Tensor, ...]:
        return tuple(relevance_rules.product(func, left.detach(), right.detach(), relevance))

    return with_pullback(lambda: func(left, right), pullback, left, right)


def _linear_map(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    state, *others = args

    def apply(each: Tensor) -> Tensor:
        result: Tensor = func(each, *others, **named)
        return result

    return with_pullback(
        lambda: apply(state),
        lambda relevance: (relevance_rules.linear_map(apply, state.detach(), relevance),),
        state,
    )


def _given(pixels: Tensor) -> bool:
    """Whether these are the images, or the copy of them that a model is called with."""
    made_by = pixels.grad_fn
    if made_by is None:
        return True
    (source, _), *others = made_by.next_functions
    return made_by.name() == "CloneBackward0" and not others and hasattr(source, "variable")


def _convolution(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    """A first layer on pixels; others have no rule here."""
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
    given |= named
    pixels, weight = given.pop("input"), given.pop("weight")
    if not _given(pixels):
        raise _refused(func)
    settings = {**given, "bias": None}

    def pullback(relevance: Tensor) -> tuple[Tensor]:
        def apply(state: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(state, weight, **settings)

        return (relevance_rules.bounded_convolution(apply, wide(pixels.detach()), wide(weight), relevance),)

    return with_pullback(lambda: widely(func, args, named), pullback, pixels)


def _attention(func: Function, args: Sequence[Any], named: dict[str, Any]) -> Tensor:
    call = SDPA_SIGNATURE.bind(*args, **named).arguments
    query, key, value = (call[name] for name in ("query", "key", "value"))
    if call.pop("enable_gqa", False):  # keys and values are repeated, for the heads that share them
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    states, call = [query, key, value], {**call, "query": query, "key": key, "value": value}
    operands = attention_operands(**call)

    with torch.no_grad():
        output: Tensor = func(**call)
    held = output.detach()  # the output itself will hold on to the pullback

    def pullback(relevance: Tensor) -> tuple[Tensor, ...]:
        if relevance.ndim == 4:
            return relevance_rules.attention(operands, held, relevance)
        return relevance_rules.attention_of_heads(operands, held, relevance)

    return with_pullback(lambda: output, pullback, *states)
