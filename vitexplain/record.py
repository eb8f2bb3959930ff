"""What methods get of a capture: one `BlockRecord` a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from .attention import Attention, RowTile, row_tiles, widen
from .combination import Combination
from .errors import CaptureError, UnsupportedModelError
from .fused_gradient import FusedGradient
from .fused_rows import propagate_row
from .fusion import FusedAttention
from .layout import TokenLayout, Windows, hand_down
from .models.adapter import BlockModules, ModelAdapter
from .needs import Needs, State

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Change:
    """How the tokens of a block differ between two of its states; each (B, N), float32 or wider.

    Attributes:
        before: lengths in the first state.
        after: lengths in the second.
        product: inner products of the two.
    """

    before: Tensor
    after: Tensor
    product: Tensor

    @classmethod
    @torch.no_grad()
    def between(cls, before: Tensor, after: Tensor) -> Change:
        """Of two states (B, N, D)."""
        with torch.autocast(before.device.type, enabled=False):  # runs within the model's forward
            product = torch.einsum("bnd,bnd->bn", before, after)  # makes no tensor of the states' size
        return cls(before.norm(dim=-1), after.norm(dim=-1), product)


@dataclass(eq=False)
class BlockRecord:
    """What was captured of one block. Attention and its gradient are computed on demand, whole or in row tiles.

    Whatever the model's precision, what is read here is float32 or wider, except q, k and v themselves.

    Attributes:
        index: zero-based position of the block.
        adapter: the adapter of the borrowed model.
        modules: where the block is tapped.
        layouts: the tokens of this block, then of each one above it.
        watched: attention was asked for.
    """

    index: int
    adapter: ModelAdapter = field(repr=False)
    modules: BlockModules = field(repr=False)
    layouts: tuple[TokenLayout, ...] = field(repr=False)
    watched: bool = field(default=False, repr=False)
    _calls: list[Attention] = field(default_factory=list, repr=False)
    _output_gradients: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _states: dict[State, Tensor] = field(default_factory=dict, repr=False)
    _state_gradients: dict[State, Tensor] = field(default_factory=dict, repr=False)
    _changes: dict[tuple[State, State], Change] = field(default_factory=dict, repr=False)
    _leaving: Tensor | None = field(default=None, repr=False)

    def state(self, kind: State) -> Tensor:
        """Token state (B, N, D) of this block.

        Raises:
            CaptureError: it was not asked for in `Needs`.
        """
        if kind == "mlp" and self.modules.mlp is None and self._has(kind):
            return self.state("out") - self.state("mid")
        if kind == "out" and not self._has(kind) and self._leaving is not None:
            return widen(self._leaving.detach())
        return widen(self._present(self._states.get(kind), f"token state {kind!r}", f"states={{{kind!r}}}"))

    @property
    def leaving(self) -> Tensor | None:
        """The tokens (B, N, D) that leave a block which is scored by itself, on its graph; None of other blocks."""
        return self._leaving

    def forget_gradient(self) -> None:
        """Zero in the place of what a backward pass left: the next one may not come by."""
        for each in self._calls:
            if isinstance(each, FusedGradient):
                each.matrix.zero_()

    def let_go(self) -> None:
        """Lets go of the graph; what was recorded stays readable."""
        self._leaving = None if self._leaving is None else self._leaving.detach()

    def change(self, before: State, after: State) -> Change:
        """How this block's tokens differ between two states.

        Raises:
            CaptureError: it was not asked for in `Needs`.
        """
        pair = (before, after)
        what = f"the change from token state {before!r} to {after!r}"
        return self._present(self._changes.get(pair), what, f"changes={{{pair!r}}}")

    def keep(self, kind: State, state: Tensor, needs: Needs) -> None:
        """Takes a token state (B, N, D) as the forward comes by it, and lets go of what is not needed any more."""
        self._states[kind] = state
        for before, after in needs.changes - self._changes.keys():
            if self._has(before) and self._has(after):
                self._changes[before, after] = Change.between(self.state(before), self.state(after))
        if needs.changes and needs.changes <= self._changes.keys():
            for done in self._states.keys() - self.sources(needs.kept_states):
                del self._states[done]

    def _has(self, kind: State) -> bool:
        return self.sources({kind}) <= self._states.keys()

    def sources(self, kinds: Set[State]) -> Set[State]:
        """The states that come by in the forward, from which these are read."""
        if "mlp" in kinds and self.modules.mlp is None:
            return kinds - {"mlp"} | {"mid", "out"}
        return kinds

    def state_gradient(self, kind: State) -> Tensor:
        """Gradient of the explained score at a token state (B, N, D).

        Raises:
            CaptureError: it was not asked for in `Needs`, or there was no backward pass yet.
        """
        what = f"the gradient of token state {kind!r}"
        return widen(self._present(self._state_gradients.get(kind), what, f"state_gradients={{{kind!r}}}"))

    @cached_property
    def operands(self) -> Attention:
        """The block's attention: q, k, v (B, H, N, dh), scale and bias, or A itself where the model wrote it out.

        Where the block attends within W windows of n places, B is B·W and N is n.

        Raises:
            CaptureError: attention was not asked for in `Needs`, or the block did not compute any that could be seen.
        """
        if not self._calls and self.watched:
            raise CaptureError(
                f"block {self.index}'s attention ({type(self.modules.attention).__name__}) called neither "
                "scaled_dot_product_attention nor multi_head_attention_forward, and multiplied no softmax with values, "
                "so there is nothing to read: use an implementation that does, or a method without attention such as "
                "gradcam"
            )
        return self.modules.combination.operands(self._present(self._calls or None, "attention", "attention=True"))

    @property
    def output_gradient(self) -> Tensor:
        """dy/dO (B, H, N, dh), O being the output before the output projection; dy/dA where A was written out."""
        found = self._present(self._output_gradients or None, "the gradient of attention", "attention_gradient=True")
        return self.modules.combination.output_gradient([found[index] for index in sorted(found)])

    @property
    def output_weight(self) -> Tensor:
        """(H, dh, D): what each head's output is multiplied with before it joins the residual stream."""
        return widen(self.adapter.output_weight(self.index))

    @property
    def value_weight(self) -> Tensor:
        """(H, D, dh): the linear map from the attention input to each head's values, bias left out."""
        return widen(self.adapter.value_weight(self.index))

    def attention(self) -> Tensor:
        """Attention probabilities, whole (B, H, N, N); (B·W, H, n, n) within windows."""
        return self.operands.probabilities()

    def attention_gradient(self) -> Tensor:
        """Derivative of the explained score by the attention probabilities, in the shape of `attention`."""
        return self.operands.gradient(self.output_gradient)

    def with_attention(self, attention: Attention) -> BlockRecord:
        """This block, another matrix in the place of its attention; its gradient is the same."""
        modules = replace(self.modules, combination=Combination())
        return replace(self, modules=modules, _calls=[attention], _output_gradients={0: self.output_gradient})

    @property
    def layout(self) -> TokenLayout:
        """The tokens of this block."""
        return self.layouts[0]

    @cached_property
    def windows(self) -> Windows | None:
        """The windows that the block attends within; None for one over all tokens."""
        return None if self.modules.windows is None else self.modules.windows(self.layout.grid)

    def tiles(self) -> Iterator[RowTile]:
        """All query rows in order, as tiles of attention and its gradient.

        Raises:
            UnsupportedModelError: the block attends within windows, so that no query row goes over all tokens.
        """
        if self.windows is not None:
            raise UnsupportedModelError(
                f"block {self.index} attends within windows, and has no one matrix over all tokens; use what goes row "
                "by row, such as generic_attention, or rollout without discard_ratio and with normalisation='row'"
            )
        return (RowTile(self.operands, self._gradient_or_none, rows) for rows in row_tiles(self.operands))

    def receive(self, row: Tensor) -> Tensor:
        """Relevance (B, N) of the tokens of this block, from that of the tokens of this block or one above it.

        The same row in models whose tokens stay the same; see `layout.hand_down` for those that merge them.
        """
        return hand_down(row, self.layouts)

    def propagate(self, row: Tensor, weigh: Callable[[RowTile], Tensor]) -> Tensor:
        """`row` (B, N) times the matrix that `weigh` makes of this block's attention; see `attention.propagate`.

        Windows are so many small matrices on the diagonal of that matrix: each takes its own part of the row.

        Raises:
            UnsupportedModelError: the row is about tokens that this block does not have.
        """
        received, windows, gradient = self.receive(row), self.windows, self._gradient_or_none
        if received is not row and not received.any() and row.any():
            raise UnsupportedModelError(
                f"the head reads none of the tokens of block {self.index}; read a block that has them, such as the last"
            )
        if windows is None:
            return propagate_row(received, self.operands, weigh, output_gradient=gradient)
        return windows.merge(propagate_row(windows.split(received), self.operands, weigh, output_gradient=gradient))

    def follow(self, row: Tensor, weigh: Callable[[RowTile], Tensor], residual: float = 0.0) -> Tensor:
        """As `propagate`, averaged over heads (B, N); of what was fused at once, which has to be the same.

        Args:
            row: (B, N) relevance of the tokens leaving the block.
            weigh: what the matrix is made of, as for `propagate`.
            residual: the weight of the row itself in the result, against that of its product.
        """
        operands = self.operands
        if isinstance(operands, FusedAttention):
            return operands.follow(row, residual)
        product = self.propagate(row, weigh).mean(1)
        return torch.lerp(product, row.to(product.dtype), residual) if residual else product

    def fused(self, weigh: Callable[[RowTile], Tensor]) -> Tensor:
        """What `weigh` makes of all rows, averaged over heads (B, N, N); or what was fused at once, likewise.

        Raises:
            UnsupportedModelError: the block attends within windows, so that no query row goes over all tokens.
        """
        if isinstance(self.operands, FusedAttention):
            return self.operands.matrix[:, 0]
        return torch.cat([weigh(tile).mean(1) for tile in self.tiles()], 1)

    @property
    def _gradient_or_none(self) -> Tensor | None:
        return self.output_gradient if self._output_gradients else None

    def _present(self, value: _Value | None, what: str, need: str) -> _Value:
        if value is None:
            raise CaptureError(
                f"block {self.index} holds no record of {what}: ask for it with Needs({need}), "
                "from this block or an earlier one, and run Capture.backward first where it is a gradient"
            )
        return value
