"""A backward pass through linear maps that visits no more tokens than it has to.

With a CLS head, nothing but the class token's gradient comes into the last block from above, and its feed-forward
branch passes it on token by token. Autograd multiplies the zeros of all other tokens with the weights, too. And where
the mean of tokens is read, one and the same gradient comes to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .modified_backward import linear_arguments, on_graph, with_pullback
from .scoped_mode import ScopedMode

_FEW = 0.5  # of the rows; gathering more costs what it saves


class SparseBackward(ScopedMode):
    """Gives linear maps behind a block's attention a backward that leaves out rows without a gradient; what all tokens
    of an image share is computed once. It is exact.

    Maps whose weights take part in the graph, or are no plain tensors, or of another precision, keep autograd's.
    """

    def watch(self, attention: nn.Module, block: nn.Module) -> list[RemovableHandle]:
        """Has what runs between the end of a block's attention and that of the block go back so."""

        def enter(*_: Any) -> None:
            self.switch(True)

        def leave(*_: Any) -> None:
            self.switch(False)

        return [attention.register_forward_hook(enter), block.register_forward_hook(leave)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is not F.linear:
            return func(*args, **named)
        state, weight, bias = linear_arguments(args, named)
        plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == state.dtype
        if not plain or not on_graph(state) or on_graph([weight, bias]):
            return func(*args, **named)
        return with_pullback(lambda: func(*args, **named), lambda each: (_transposed(each, weight),), state)


def _transposed(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient · weight (…, in), of a gradient (…, out) many of whose rows may be zero, or the same for all tokens."""
    gradient = gradient.to(weight.dtype)  # that of an autocast map is in half precision
    rows = gradient.flatten(0, -2)
    # of one row the product is another routine's, whose rounding depends on the number of threads: two at least
    if rows[-1].any():
        if gradient.ndim == 3 and bool(
            (gradient[:, -1] == gradient[:, 0]).all() and (gradient == gradient[:, :1]).all()
        ):
            return (gradient[:, :2] @ weight)[:, :1].expand(*gradient.shape[:-1], weight.shape[1])
        return gradient @ weight
    busy = ((rows.amax(1) != 0) | (rows.amin(1) != 0)).nonzero().squeeze(1)  # not a norm: small squares vanish
    if len(busy) > _FEW * len(rows):
        return gradient @ weight
    if len(busy) == 1:
        busy = torch.cat([busy, (busy + 1) % len(rows)])
    found = gradient.new_zeros(len(rows), weight.shape[1])
    found[busy] = rows[busy] @ weight
    return found.view(*gradient.shape[:-1], -1)
