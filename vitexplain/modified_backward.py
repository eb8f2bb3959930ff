"""Backward passes by other rules than the derivative: in the forward, chosen operations get another pullback.

A `TorchFunctionMode` sees every torch call of the forward. Where a rule exists for a call that depends on the image,
the call's value stays what it was and its backward is the rule's. Nothing is patched, and nothing outlives the forward
but the autograd graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import Attention
from .errors import UnsupportedModelError
from .layout import Arrangement
from .tap import multi_head

if TYPE_CHECKING:
    from .linear_products import LinearProducts

Function = Callable[..., Any]

Rule = Callable[[Function, Sequence[Any], dict[str, Any]], Any]
"""Makes a call, given the function and its arguments: the same value, another backward."""

MULTIPLY: frozenset[Function] = frozenset(
    {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
)
DIVIDE: frozenset[Function] = frozenset(
    {torch.div, torch.true_divide, torch.divide, Tensor.div, Tensor.divide, Tensor.__truediv__}
)
MATRIX_PRODUCT: frozenset[Function] = frozenset(
    {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__}
)
SOFTMAX: frozenset[Function] = frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax})
RMS_NORM: frozenset[Function] = frozenset({F.rms_norm} if hasattr(F, "rms_norm") else ())  # from torch 2.4 on
GATE: frozenset[Function] = frozenset(
    {torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, torch.erf, Tensor.erf}
)
"""What makes a factor between two constants, and never a state of its own."""


class BackwardRules(ABC):
    """Rules of a backward pass; a frozen dataclass, so that needs with the same rules are equal."""

    @property
    def linear(self) -> bool:
        """Whether what arrives at a tensor is linear in what leaves the output, as a derivative is."""
        return True

    @property
    def widens(self) -> bool:
        """Whether the forward is in double precision, so that a model in half precision would answer otherwise."""
        return False

    def images_at_a_time(self, device: torch.device) -> int | None:
        """How many images a capture by these rules takes at most on a device; None for any number."""
        return None

    @abstractmethod
    def watching(self, batch: int, arrangement: Arrangement) -> ModifiedBackward:
        """What is entered around the forward.

        Args:
            batch: number of images.
            arrangement: the axes of a token state inside the model.
        """

    def at_attention(self, attention: Attention, tracked: Tensor, arrived: Tensor) -> Tensor:
        """What a record holds as the gradient at attention.

        Args:
            attention: one call of attention.
            tracked: its output O (B, H, N, dh), or A (B, H, N, N) where it was written out.
            arrived: what the backward pass brought there, in the shape of `tracked`.
        """
        return arrived


class _WithPullback(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], Tensor], pullback: Callable[[Tensor], tuple[Any, ...]], *_: Tensor
    ) -> Tensor:
        ctx.pullback = pullback
        return _of_its_own(compute())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.pullback(gradients[0]))


def _of_its_own(value: Tensor) -> Tensor:
    """The same memory, not as a view: a view made here could not be changed in place, and some releases of torch give
    one for a linear map.
    """
    alias: Tensor = torch.ops.aten._unsafe_view(value, value.shape) if value._is_view() else value
    return alias


def with_pullback(
    compute: Callable[[], Tensor], pullback: Callable[[Tensor], tuple[Any, ...]], *inputs: Tensor
) -> Tensor:
    """A value with a backward of its own.

    Args:
        compute: gives the value, a fresh tensor.
        pullback: what goes back to each input, from what arrived at the value.
        inputs: tensors that take part in the graph.
    """
    result: Tensor = _WithPullback.apply(compute, pullback, *inputs)
    return result


def with_transpose(
    apply: Callable[..., Tensor], *states: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """What a map gives, and its transpose in each state: takes a tensor in the shape of the result."""
    leaves = [state.detach().requires_grad_() for state in states]
    with torch.enable_grad():
        result = apply(*leaves)

    def transpose(tensor: Tensor) -> tuple[Tensor, ...]:
        torch.autograd.backward(result, tensor, inputs=leaves)
        return tuple(leaf.grad for leaf in leaves if leaf.grad is not None)

    return result.detach(), transpose


def gradients(
    score: Tensor, output: Tensor, tensors: Sequence[Tensor], retain_graph: bool
) -> tuple[list[Tensor], Tensor]:
    """What arrives at tensors from a score () of the model's output; and at the output.

    Nothing does from a score that the output has no part in.

    Raises:
        UnsupportedModelError: the output does not depend on some of the tensors.
    """
    *found, arrived = torch.autograd.grad(score, [*tensors, output], retain_graph=retain_graph, allow_unused=True)
    if arrived is None:
        return [torch.zeros_like(each) for each in tensors], torch.zeros_like(output)
    return _all_arrived(found), arrived


def gradients_by_sign(
    score: Tensor, output: Tensor, tensors: Sequence[Tensor], retain_graph: bool
) -> tuple[list[Tensor], Tensor]:
    """The same, where what leaves the output above zero and below goes back apart, and is added on arrival.

    Rules that share by totals have nothing to share of one class against another: together the two are zero.
    """
    (arrived,) = torch.autograd.grad(score, output, retain_graph=retain_graph, materialize_grads=True)
    parts = [part for part in (arrived.clamp(min=0), arrived.clamp(max=0)) if part.any()] or [arrived]
    found = [
        _all_arrived(
            torch.autograd.grad(
                output, tensors, part, retain_graph=retain_graph or part is not parts[-1], allow_unused=True
            )
        )
        for part in parts
    ]
    return [sum(rest, first) for first, *rest in zip(*found, strict=True)], arrived


def _all_arrived(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """A tensor to which nothing leads would count as one that makes no difference."""
    found = [each for each in gradients if each is not None]
    if len(found) < len(gradients):
        raise UnsupportedModelError(
            f"the model's output is not joined to {len(gradients) - len(found)} of {len(gradients)} tensors of its "
            "blocks that gradients are asked for, so that nothing could be said of them; expected a forward with "
            "gradients throughout. Does the model detach its tokens between blocks, or does its head not read the "
            "last block? Choose a method without a gradient, such as rollout, or a layer that is read"
        )
    return found


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same values; whatever comes back is multiplied by a factor."""
    if not tensor.requires_grad:
        return tensor
    view = tensor.view_as(tensor)
    view.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    return view


def on_graph(value: Any) -> bool:
    """Whether an argument, or something in it, depends on what the backward pass goes to."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, list | tuple) and any(on_graph(each) for each in value)


def linear_arguments(args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """State, weight and bias, or None, of a call of `F.linear`."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(named)
    return given["input"], given["weight"], given.get("bias")


def name_of(function: Function) -> str:
    """How a torch function is called in messages."""
    return str(getattr(function, "__name__", function))


def refuse(function: Function, what: str, remedy: str) -> UnsupportedModelError:
    """The error for an operation that has no rule."""
    return UnsupportedModelError(
        f"the model computes {name_of(function)!r}, for which {what} has no rule; expected linear maps, softmax "
        f"attention, LayerNorm or RMSNorm, GELU, SiLU or gated feed-forward layers. {remedy}"
    )


class ModifiedBackward(TorchFunctionMode):
    """Applies rules to the calls of a forward that depend on what the backward pass goes to.

    Args:
        rules: a rule for each function that gets one.

    Attributes:
        products: what linear maps gave, where that serves a second forward.
    """

    products: LinearProducts | None = None

    def __init__(self, rules: Mapping[Function, Rule]) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if not (on_graph(args) or on_graph(list(named.values()))):
            return self.below(func, args, named)
        if func is F.multi_head_attention_forward:  # hides its attention: computed here from its parts, seen one by one
            with self:
                return multi_head(lambda _, kernel: kernel(), *args, **named)
        return self.call(func, args, named)

    def below(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """One call on tensors that are no part of the graph."""
        return func(*args, **named)

    def call(self, func: Function, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """One call on tensors of the graph."""
        rule = self.rules.get(func)
        return func(*args, **named) if rule is None else rule(func, args, named)
