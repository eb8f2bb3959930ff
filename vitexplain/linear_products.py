"""What the linear maps of one forward gave, in the place of the same maps in a second forward of the same images.

A forward in double precision settles what a forward in single precision would compute again, and nearly all of a
forward is products of states with weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .borrowing import autocast_is_on
from .modified_backward import linear_arguments, on_graph, with_pullback

_PRECISIONS = (torch.float32, torch.float64)  # a product in half precision is another number


class LinearProducts:
    """Products x wᵀ of states and the model's own weights; each is taken once.

    A weight that was used more than once is not known: which of its calls a later one is cannot be told for certain.
    """

    def __init__(self) -> None:
        self._held: dict[nn.Parameter, tuple[torch.Size, Tensor] | None] = {}

    def keep(self, state: Tensor, weight: Tensor, product: Tensor) -> None:
        """Holds a product (…, E), in the precision of the weight (E, D); what is no parameter is not known again."""
        if type(weight) is nn.Parameter and weight.dtype == product.dtype and weight.dtype in _PRECISIONS:
            self._held[weight] = None if weight in self._held else (state.shape, product)

    def take(self, state: Tensor, weight: Tensor) -> Tensor | None:
        """The product of the weight's call, and no longer held; None where another or none is known."""
        if type(weight) is not nn.Parameter or state.dtype != weight.dtype:
            return None
        known = self._held.get(weight)
        if known is None or known[0] != state.shape:
            return None
        self._held[weight] = None
        return known[1]

    def clear(self) -> None:
        """Lets go of what was not taken."""
        self._held.clear()


class KnownProducts(TorchFunctionMode):
    """Linear maps whose product is known add their bias to it; their backward is that of the linear map.

    Args:
        products: of an earlier forward of the same images.
    """

    def __init__(self, products: LinearProducts) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is not F.linear:
            return func(*args, **named)
        state, weight, bias = linear_arguments(args, named)
        if on_graph([weight, bias]) or autocast_is_on(state.device.type):
            return func(*args, **named)
        product = self._products.take(state, weight)
        if product is None:
            return func(*args, **named)

        def compute() -> Tensor:
            return product.clone() if bias is None else product + bias

        return with_pullback(compute, lambda gradient: (gradient @ weight,), state) if on_graph(state) else compute()
