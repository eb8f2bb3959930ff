"""The last block for those tokens alone that the head reads.

A CLS head looks at one token of the last block's output. What that block computes for the others behind its attention
(the output projection, the feed-forward branch) and their rows of attention itself nobody reads: on ViT-B/16 a
sixteenth of the whole forward, and of the backward.

It is done where all that runs behind the other blocks is the code of a known library, nobody looks on, and the logits
of one image are those of the whole model, which is tried once. And in a forward without a graph, what is not computed
is NaN: whatever reads it after all makes the logits NaN, and the model then runs whole. In a forward with a graph it
is zero, since NaN would come back as gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from .borrowing import all_modules, is_watched, runs_library_code
from .combination import Combination
from .errors import UnsupportedModelError, is_out_of_memory
from .models.adapter import BlockModules, ModelAdapter
from .modified_backward import linear_arguments
from .scoped_mode import ScopedMode
from .state_tap import watch_state

_FEW = 0.25  # of the tokens; with more there is little to save
_ROWS = 2  # at least: of one row the product is another routine's, whose rounding depends on the number of threads
_NAN = float("nan")
_ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest logit
_ALIKE_IN_HALF = 0.03

_TRIED: WeakKeyDictionary[nn.Module, tuple[list[ref[nn.Module]], bool]] = WeakKeyDictionary()
"""Last block → the modules that were there beside the other blocks when it was tried, and whether the logits were those
of the whole model."""


def first_tokens_read(adapter: ModelAdapter, tokens: int) -> int | None:
    """How many of N final tokens a head reads, from the first on; None where they are many, or nobody knows which."""
    if not adapter.blocks or adapter.pool is not None:
        return None
    try:
        read = int(adapter.seed(tokens).nonzero().max()) + 1
    except UnsupportedModelError:
        return None
    return read if read <= _FEW * tokens else None


@dataclass(frozen=True, eq=False)
class ShortLastBlock:
    """A model whose head reads the first few tokens of its last block.

    Attributes:
        adapter: of the borrowed model.
        read: how many of them the head reads, from the first on.
        modules: all modules of the model but those of the other blocks.
    """

    adapter: ModelAdapter
    read: int
    modules: list[nn.Module]

    @classmethod
    def of(
        cls, adapter: ModelAdapter, tokens: int, everything: Sequence[nn.Module] | None = None
    ) -> ShortLastBlock | None:
        """None where it cannot be done.

        Args:
            adapter: of the borrowed model.
            tokens: N, those of the last block.
            everything: all modules of the model, where they are known; see `all_modules`.
        """
        read = first_tokens_read(adapter, tokens)
        if read is None or max(read, _ROWS) > _FEW * tokens:
            return None
        last, others = adapter.blocks[-1], [each.block for each in adapter.blocks[:-1]]
        if type(last.combination) is not Combination or last.windows or last.arrangement not in ("BND", "NBD"):
            return None
        if torch_modules._has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        if any(map(is_watched, all_modules(adapter.model) if everything is None else everything)):
            return None
        modules = all_modules(adapter.model, without=others)
        return cls(adapter, read, modules) if all(map(runs_library_code, modules)) else None

    def holds(self, images: Tensor) -> bool:
        """Whether the logits of images (B, channels, H, W) are those of the whole model; tried on one of them, once."""
        block = self.adapter.blocks[-1].block
        then, holds = _TRIED.get(block, ([], False))
        if [each() for each in then] == self.modules:
            return holds
        found = self._try(images[:1].detach())
        if found is not None:
            _TRIED[block] = ([ref(each) for each in self.modules], found)
        return found is True

    @torch.no_grad()
    def _try(self, image: Tensor) -> bool | None:
        """What came out; None where the whole model's logits are not finite, and tell nothing."""
        whole = self.adapter.logits(image)
        if not whole.isfinite().all():
            return None
        try:
            with self.applied():
                short = self.adapter.logits(image)
        except Exception as error:  # something counts tokens, or looks for NaN
            if is_out_of_memory(error):
                raise
            return False
        tolerance = _ALIKE.get(whole.dtype, _ALIKE_IN_HALF) * whole.abs().max()
        return bool((short - whole).abs().max() <= tolerance)  # NaN is not

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the last block of a forward is shortened."""
        last, read, graph = self.adapter.blocks[-1], self.read, torch.is_grad_enabled()

        def cut(state: Tensor) -> Tensor:
            return F.pad(state[:, :read], (0, 0, 0, state.shape[1] - read), value=_NAN)

        with _ReadTokens(last, max(read, _ROWS), 0.0 if graph else _NAN) as mode, ExitStack() as hooks:
            for handle in mode.watch():
                hooks.callback(handle.remove)
            if not graph:
                hooks.callback(watch_state(last, "out", cut).remove)
            yield


def plain_logits(adapter: ModelAdapter, images: Tensor) -> Tensor:
    """As `ModelAdapter.logits`, where nothing but the logits (B, C) is asked for: the last block is shortened."""
    layouts = adapter.layouts(adapter.grid((images.shape[-2], images.shape[-1])))
    short = ShortLastBlock.of(adapter, layouts[-1].count) if layouts else None
    if short is None or not short.holds(images):
        return adapter.logits(images)
    with short.applied():
        found = adapter.logits(images)
    return adapter.logits(images) if found.isnan().any() else found


class _ReadTokens(ScopedMode):
    """Computes attention and what lies behind it for the first tokens; the others are filled.

    Args:
        modules: the block.
        rows: how many tokens are computed.
        filling: what the others are.
    """

    def __init__(self, modules: BlockModules, rows: int, filling: float) -> None:
        super().__init__()
        self._modules, self._rows, self._filling = modules, rows, filling
        self._axis = 0 if modules.arrangement == "NBD" else 1
        self._tokens = self._images = 0
        self._attended = self._left = False

    def watch(self) -> list[RemovableHandle]:
        """Has the block's calls seen; a straight feed-forward branch gets the first tokens and no others."""

        def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            state = next(iter((*arguments, *named.values())), None)
            if isinstance(state, Tensor) and state.ndim == 3 and state.shape[self._axis] > self._rows:
                self._tokens, self._images = state.shape[self._axis], state.shape[1 - self._axis]
                self._attended = self._left = False
                self.switch(True)

        def behind(*_: Any) -> None:
            self._attended = self._left = True

        def leave(*_: Any) -> None:
            self.switch(False)
            self._tokens = 0

        def narrow(state: Tensor) -> Tensor:
            self.switch(False)
            return state[:, : self._rows] if self._tokens else state

        def widen(state: Tensor) -> Tensor:
            return self._filled(state, 1)

        block, attention = self._modules.block, self._modules.attention
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        if attention is not block:
            handles.append(attention.register_forward_hook(behind))
        if self._modules.straight:
            handles += [watch_state(self._modules, "mid", narrow), watch_state(self._modules, "mlp", widen)]
        return handles

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **named)
        if func is F.linear and self._attended:
            return self._map(*linear_arguments(args, named))
        return func(*args, **named)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        tokens, rows = self._tokens, self._rows
        if query.ndim != 4 or query.shape[2] != tokens or key.shape[2] != tokens:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **named)
        self._attended = True
        if attn_mask is not None and attn_mask.shape[-2] == tokens:
            attn_mask = attn_mask[..., :rows, :]
        return self._filled(
            F.scaled_dot_product_attention(query[:, :, :rows], key, value, attn_mask, *rest, **named), 2
        )

    def _map(self, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axis = self._axis_of_tokens(state)
        if axis is None:
            return F.linear(state, weight, bias)
        return self._filled(F.linear(state.narrow(axis, 0, self._rows).contiguous(), weight, bias), axis)

    def _axis_of_tokens(self, state: Tensor) -> int | None:
        """The axis of the tokens; None where there is none, or where it might be either."""
        if state.ndim != 3:
            return None
        if self._left:
            return self._axis if state.shape[self._axis] == self._tokens else None
        # an attention may swap the axes
        fitting = [
            axis for axis in (0, 1) if (state.shape[axis], state.shape[1 - axis]) == (self._tokens, self._images)
        ]
        return fitting[0] if len(fitting) == 1 else None

    def _filled(self, rows: Tensor, axis: int) -> Tensor:
        missing = max(self._tokens - rows.shape[axis], 0)
        return F.pad(rows, [0, 0] * (rows.ndim - 1 - axis) + [0, missing], value=self._filling)
