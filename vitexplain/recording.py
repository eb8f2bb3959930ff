"""Recording: the hooks by which one forward fills the records of its blocks, and one backward their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .attention import Attention, AttentionOperands
from .borrowing import autocast_is_on, runs_library_code
from .combination import Combination
from .errors import CaptureError, UnsupportedModelError
from .fused_gradient import FusedGradient, GradientFusion
from .fusion import attend, fuses_well
from .models.adapter import BlockModules, ModelAdapter
from .needs import Needs, State
from .record import BlockRecord
from .short_last_block import ShortLastBlock, first_tokens_read
from .sparse_backward import SparseBackward
from .state_tap import watch_state
from .tap import AttentionTap, Instead

Store = Callable[[Tensor], None]
"""Takes the gradient at a tensor."""


class Recording:
    """What one forward of a batch records.

    Args:
        adapter: of the borrowed model.
        needs: what is recorded, from a block that is a number.
        blocks: one record a block, to be filled.
        batch: number of images.
        short: how the last block is computed for the tokens alone that the head reads; None for all tokens.

    Attributes:
        pool: the record of an attention-pooling head; None for other heads, or where no attention is recorded.
        tracked: the tensors whose gradients are asked for, and what takes each.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        needs: Needs,
        blocks: Sequence[BlockRecord],
        batch: int,
        short: ShortLastBlock | None = None,
    ) -> None:
        self._adapter, self._needs, self._blocks, self._batch, self._short = adapter, needs, blocks, batch, short
        self._recorded = blocks[int(needs.from_block) :]
        self.pool: BlockRecord | None = None
        if needs.every_attention and adapter.pool is not None:
            self.pool = BlockRecord(len(blocks), adapter, adapter.pool, (blocks[-1].layout,), True)
        self.tracked: list[tuple[Tensor, Store]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The forward that runs inside is recorded.

        Raises:
            CaptureError: on leaving, where attention was not seen, or not over the tokens that the model has.
        """
        with ExitStack() as stack:
            if self._short is not None:  # around the watch on attention
                stack.enter_context(self._short.applied())
            # behind attention the one watch ends before the other begins
            self._place_hooks(stack)
            self._shorten_backward(stack)
            yield
        self._check()

    def track(self, tensor: Tensor, store: Store) -> Tensor:
        """The tensor on the graph, which starts here if it did not start below; `store` takes its gradient.

        Raises:
            UnsupportedModelError: the model runs this where gradients are switched off.
        """
        if not torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"a part of this {type(self._adapter.model).__name__} runs where gradients are switched off "
                "(torch.no_grad(), inference_mode, or checkpointing with use_reentrant=True), so that nothing could "
                "be said of it; expected a forward with gradients throughout. Take that out of the model's forward "
                "(weights are frozen here in any case), or choose a method without a gradient, such as rollout"
            )
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_(True)
        self.tracked.append((tensor, store))
        return tensor

    def _place_hooks(self, stack: ExitStack) -> None:
        tap, needs = AttentionTap(self._batch), self._needs
        for record in self._recorded:
            scored = record.index >= len(self._blocks) - needs.apart
            if needs.every_attention or scored:
                record.watched = True
                keep = self._keep_attention(record, scored or needs.attention_gradient)
                attention, between = record.modules.attention, record.modules.between
                between = between if runs_library_code(attention) else None
                _removed_with(stack, tap.watch(attention, keep, self._fuse_heads(record), between))
            kinds = record.sources(needs.recorded_states)
            for kind in sorted(kinds):
                _removed_with(stack, [watch_state(record.modules, kind, self._keep_state(kind, record))])
            if scored:
                _removed_with(stack, [watch_state(record.modules, "out", _cut_behind(record))])
        if self.pool is not None:
            _removed_with(stack, tap.watch(self.pool.modules.attention, _keep_last(self.pool)))
        if needs.any_attention:
            stack.enter_context(tap)

    def _shorten_backward(self, stack: ExitStack) -> None:
        """Of the last block, only the tokens that the head reads go back, where those are few.

        In blocks that are scored apart, a gradient that all tokens share goes back once.
        """
        if self._needs.backward is not None or self._short is not None or not self._blocks:
            return
        if self._needs.apart:
            _watch_behind_attention(stack, [each.modules for each in self._blocks[-self._needs.apart :]])
        elif self._needs.gradient and first_tokens_read(self._adapter, self._blocks[-1].layout.count) is not None:
            _watch_behind_attention(stack, [self._blocks[-1].modules])

    def _keep_state(self, kind: State, record: BlockRecord) -> Callable[[Tensor], Tensor]:
        def store(gradient: Tensor) -> None:
            record._state_gradients[kind] = gradient

        def keep(state: Tensor) -> Tensor:
            if kind in self._needs.state_gradients:
                state = self.track(state, store)
            record.keep(kind, state.detach(), self._needs)
            return state

        return keep

    def _keep_attention(self, record: BlockRecord, tracked: bool) -> Callable[[Attention, Tensor], Tensor]:
        def keep(operands: Attention, output: Tensor) -> Tensor:
            index = len(record._calls)
            record._calls.append(operands)
            if not tracked:
                return output

            def store(value: Tensor) -> None:
                rules = self._needs.backward
                arrived = value if rules is None else rules.at_attention(operands, output.detach(), value)
                record._output_gradients[index] = arrived

            return self.track(output, store)

        return keep

    def _fuse_heads(self, record: BlockRecord) -> Instead | None:
        """What computes a block's attention where its heads are fused at once; None where they are not."""
        needs = self._needs
        if type(record.modules.combination) is not Combination or record.windows is not None:
            return None
        if self._short is not None and record is self._blocks[-1]:
            return None  # of which a few rows are computed, and read
        if needs.fused_gradient is not None and needs.backward is None:
            return self._with_fused_gradient(record, needs.fused_gradient)
        fusion = None if needs.gradient else needs.fusion
        if fusion is None:
            return None

        def instead(operands: AttentionOperands, _: Sequence[Tensor] | None) -> Tensor | None:
            if not fuses_well(operands):
                return None
            fused, output = attend(operands, fusion)
            record._calls.append(fused)
            return output

        return instead

    def _with_fused_gradient(self, record: BlockRecord, fusion: GradientFusion) -> Instead:
        def instead(operands: AttentionOperands, given: Sequence[Tensor] | None) -> Tensor | None:
            if given is None or not fuses_well(operands) or autocast_is_on(operands.q.device.type):
                return None
            if any(each.shape[1] != operands.shape[1] or each.dtype != operands.q.dtype for each in given):
                return None
            fused, (q, k, v) = FusedGradient.of(operands, fusion), given
            record._calls.append(fused)
            output = fused.attend(q, k, v, operands.scale)
            if output.requires_grad:
                return output
            return self.track(output, lambda arrived: fused.receive(operands, arrived))

        return instead

    def _check(self) -> None:
        for record in [*self._blocks, *([self.pool] if self.pool else [])]:
            if not record.watched:
                continue
            (prefix, (h, w)), windows = (record.layout.prefix, record.layout.grid), record.windows
            expected, found = (record.layout.count if windows is None else windows.area), record.operands.num_keys
            if found != expected and not (record is self.pool and found == h * w):
                places = "" if windows is None else f", in windows of {expected}"
                raise CaptureError(
                    f"block {record.index} attends over {found} tokens; expected {expected} = "
                    f"{prefix} prefix tokens + {h}×{w} patches{places}"
                )


def _keep_last(pool: BlockRecord) -> Callable[[Attention, Tensor], Tensor]:
    """Keeps the last attention of a pool: where it is computed in a forward that also calls blocks, theirs come by."""

    def keep(operands: Attention, output: Tensor) -> Tensor:
        pool._calls[:] = [operands]
        return output

    return keep


def _watch_behind_attention(stack: ExitStack, blocks: list[BlockModules]) -> None:
    sparse = stack.enter_context(SparseBackward())
    for each in blocks:
        _removed_with(stack, sparse.watch(each.attention, each.block))


def _removed_with(stack: ExitStack, handles: Sequence[RemovableHandle]) -> None:
    """Hooks go with the stack from the moment they are there: what comes next may raise."""
    for handle in handles:
        stack.callback(handle.remove)


def _cut_behind(record: BlockRecord) -> Callable[[Tensor], Tensor]:
    """Keeps what leaves a block on its graph; the model goes on with a copy, which it may change in place."""

    def cut(state: Tensor) -> Tensor:
        record._leaving = state
        return state.detach().clone()

    return cut
