"""Capture: what a forward (and backward) pass through a borrowed model leaves for the methods.

Forward hooks bring the token states, an `AttentionTap` the attention, so the fused kernel keeps running and no model is
patched. Weights are frozen meanwhile, and the autograd graph starts at the first tensor whose gradient is asked
for: whatever lies below it is an ordinary forward without a graph.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from .borrowing import all_modules, borrowed, callers_autocast, check_unquantised
from .combination import WithoutFirstKeys
from .errors import CaptureError, UnsupportedModelError
from .layout import TokenLayout
from .linear_products import KnownProducts, LinearProducts
from .models import adapt
from .models.adapter import ModelAdapter
from .modified_backward import gradients, gradients_by_sign
from .needs import BEHIND_ATTENTION, Needs
from .record import BlockRecord
from .recording import Recording
from .short_last_block import ShortLastBlock
from .targets import ExplainedScore

_NO_GRADIENT = (
    "the score carries no gradient: make it, with differentiable operations, of the logits that Capture.forward gave, "
    "and ask for gradients in Needs; with Needs(apart=…), of the tokens that leave the blocks"
)


class Capture:
    """One forward pass of a borrowed model and as many backward passes as there are targets.

    ::

        with Capture(model, Needs(attention_gradient=True)) as capture:
            logits = capture.forward(images)
            capture.backward(logits[:, 281].sum())
            capture.blocks[-1].attention_gradient()

    Inside the `with` the model is in evaluation mode with frozen weights, after it as before. One thread a model.

    Attributes:
        adapter: the model's adapter.
        needs: what is recorded.
        blocks: one record a block, L in all; those below `needs.from_block`, here always an index, stay empty.
        images: the (B, channels, H, W) input of the forward pass.
        pool: the record of an attention-pooling head; None for other heads, or where no attention is recorded.
        logits: the model's output (B, C), detached.
        explained: the score that is explained, for methods that ask for it again; None where nothing was said of it.
        grid: patch grid (h, w).
        extent: pixels (height, width) of the images that the grid takes up; None where just the images.
        layouts: the tokens of each block.
    """

    images: Tensor
    logits: Tensor
    grid: tuple[int, int]
    extent: tuple[int, int] | None
    layouts: tuple[TokenLayout, ...]
    pool: BlockRecord | None = None
    explained: ExplainedScore | None = None

    def __init__(self, model: nn.Module | ModelAdapter, needs: Needs) -> None:
        self.adapter = adapt(model)
        self._first = self.adapter.check_block(needs.from_block)
        self.needs = replace(needs, from_block=self._first)
        self.blocks: list[BlockRecord] = []
        self._recording: Recording | None = None
        self._context: ExitStack | None = None
        self._output: Tensor | None = None
        self._score_gradient: Tensor | None = None
        self._image_gradient: Tensor | None = None
        self._others: dict[Needs, Capture] = {}
        self._products: LinearProducts | None = None
        self._modules: list[nn.Module] | None = None

    def __enter__(self) -> Capture:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # in a caller's no graph could be recorded
            stack.enter_context(torch.set_grad_enabled(self.needs.gradient or self.needs.apart > 0))
            self._modules = all_modules(self.adapter.model)
            if torch.is_grad_enabled():
                check_unquantised(self.adapter.model, self._modules)
            stack.enter_context(borrowed(self.adapter.model, self._modules))
            stack.enter_context(self.adapter.prepared())
            self._context = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None
        self._let_go()

    def _let_go(self) -> None:
        """Lets go of the graph; the records stay readable."""
        if self._recording is not None:
            self._recording.tracked.clear()  # what takes a gradient holds on to who asked for it
        self._recording = self._output = None
        for block in self.blocks:
            block.let_go()
        if self._products is not None:
            self._products.clear()
        for other in self._others.values():
            other._let_go()
        self._others.clear()

    @property
    def classes(self) -> Tensor | None:
        """(B,) the class that is explained; None for a contrast, a function, or nothing said."""
        return None if self.explained is None else self.explained.classes

    @property
    def num_tokens(self) -> int:
        """N: the tokens that the head reads, prefix and patches."""
        return self.layouts[-1].count

    @property
    def image_gradient(self) -> Tensor:
        """Gradient of the explained score at the images (B, channels, H, W).

        Raises:
            CaptureError: it was not asked for in `Needs`, or there was no backward pass yet.
        """
        if self._image_gradient is None:
            raise CaptureError(
                "found no gradient at the images: ask for it with Needs(image_gradient=True), and run Capture.backward"
            )
        return self._image_gradient

    def seed_row(self) -> Tensor:
        """Where a rollout starts: the weight (B, N) with which the head reads each final token.

        An attention pool's is its attention, a mean over heads and queries. What it gives to keys that are no tokens,
        such as its own query, is left out, and the rest made sum 1.
        """
        if self.pool is not None:
            row = self.pool.attention().mean((1, 2))
            if isinstance(self.pool.modules.combination, WithoutFirstKeys):
                row = row / row.sum(1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)
            return F.pad(row, (self.num_tokens - row.shape[1], 0))
        seed = self.adapter.seed(self.num_tokens).to(self.images.device)
        return seed.expand(len(self.images), -1)

    def forward(self, images: Tensor) -> Tensor:
        """Runs the model once and records.

        Args:
            images: (B, channels, H, W), normalised; see `ModelAdapter.check_images`.

        Returns:
            The model's output (B, C), on the graph if the needs include gradients.

        Raises:
            InputError: the images do not fit the model.
            CaptureError: called outside the `with` or a second time, or the model's attention was not seen.
        """
        if self._context is None or self.blocks:
            raise CaptureError("Capture.forward runs once, inside the `with` of a fresh Capture")
        # clone: a tensor made in the caller's inference_mode cannot take part in a graph
        self.images = self.adapter.check_images(images.clone() if images.is_inference() else images)
        size = (self.images.shape[-2], self.images.shape[-1])
        self.grid, self.extent = self.adapter.grid(size), self.adapter.extent(size)
        self.layouts = self.adapter.layouts(self.grid)
        with callers_autocast():
            short = self._short_last_block()
            output = self._recorded(short)
            if short is not None and output.isnan().any():  # something reads what was not computed
                output = self._recorded(None)
        self.logits = output.detach() if self.needs.backward is None else output.detach().to(self.images.dtype)
        self._output = output
        return output

    def _short_last_block(self) -> ShortLastBlock | None:
        """The last block for the tokens alone that the head reads, where nothing more of it is recorded, or known."""
        needs = self.needs
        whole = needs.recorded_states & BEHIND_ATTENTION or needs.apart or needs.backward is not None
        if whole or self._products is not None or not self.layouts:
            return None
        short = ShortLastBlock.of(self.adapter, self.layouts[-1].count, self._modules)
        return short if short is not None and short.holds(self.images) else None

    def _recorded(self, short: ShortLastBlock | None) -> Tensor:
        """The model's output, and the records filled, from one forward."""
        self.blocks = [
            BlockRecord(index, self.adapter, modules, self.layouts[index:])
            for index, modules in enumerate(self.adapter.blocks)
        ]
        # known before the forward, so that a forward that raises leaves nothing behind either
        recording = self._recording = Recording(self.adapter, self.needs, self.blocks, len(self.images), short)
        with ExitStack() as hooks:
            if self.needs.backward is not None:
                arrangement = self.adapter.blocks[0].arrangement
                mode = hooks.enter_context(self.needs.backward.watching(len(self.images), arrangement))
                self._products = mode.products
            elif self._products is not None:
                hooks.enter_context(KnownProducts(self._products))
            hooks.enter_context(recording.hooked())
            output = self.adapter.logits(self._watched_images(recording))
        self.pool = recording.pool
        return output

    def backward(self, score: Tensor, *, retain_graph: bool = False) -> None:
        """Fills the records' gradients with those of one score; the model's own `.grad` is not touched.

        Args:
            score: () scalar made of the output of `forward`, or of the tokens that leave blocks which are scored apart.
                Images of a batch do not interact, so the sum over the batch gives each image its own gradient.
            retain_graph: keep the graph for a further target.

        Raises:
            CaptureError: the score carries no gradient, or none was asked for in Needs.
            UnsupportedModelError: the score does not depend on a part of the model that is to be explained, or that
                part is checkpointed.
        """
        tracked = self._recording.tracked if self._recording is not None else []
        if not score.requires_grad or not tracked or self._output is None:
            raise CaptureError(_NO_GRADIENT)
        rules, tensors = self.needs.backward, [tensor for tensor, _ in tracked]
        for block in self.blocks:
            block.forget_gradient()
        with torch.autocast(self.images.device.type, enabled=False):  # a caller's is about the forward
            try:
                if self.needs.apart:
                    found = list(torch.autograd.grad(score, tensors, retain_graph=retain_graph, materialize_grads=True))
                else:
                    gradients_of = gradients if rules is None or rules.linear else gradients_by_sign
                    found, self._score_gradient = gradients_of(score, self._output, tensors, retain_graph)
            except CheckpointError as error:
                raise UnsupportedModelError(
                    f"this {type(self.adapter.model).__name__} computes a part of itself a second time in the backward "
                    "pass (torch.utils.checkpoint), when nothing watches it; expected a forward that is computed once: "
                    "switch checkpointing off, or choose a method without a gradient, such as rollout"
                ) from error
        for (_, store), gradient in zip(tracked, found, strict=True):
            store(gradient)
        for other in self._others.values():
            other._score_gradient = None

    def meeting(self, needs: Needs) -> Capture:
        """What these needs ask for, of the same images and score, by their own backward rules.

        That is this capture, if it follows the same rules; else a second one, whose forward runs once for all targets,
        and whose backward is that of the score to which this capture's last one belongs. What linear maps gave in
        double precision is not computed again.

        Raises:
            CaptureError: there was no backward pass yet.
        """
        if needs.backward == self.needs.backward:
            return self
        if self._score_gradient is None:
            raise CaptureError("Capture.meeting needs the score: run Capture.backward first")
        with torch.inference_mode(False), torch.enable_grad():
            other = self._others.get(needs) or Capture(self.adapter, needs)
            if other._output is None:
                other._context = self._context  # the model is borrowed already
                other._products = self._products
                self._others[needs] = other  # before the forward, so that one that raises leaves nothing behind
                other.forward(self.images)
            if other._score_gradient is None and other._output is not None:
                other.backward((other._output * self._score_gradient).sum(), retain_graph=True)
        other.explained = self.explained
        return other

    def _watched_images(self, recording: Recording) -> Tensor:
        if not self.needs.image_gradient:
            return self.images

        def store(gradient: Tensor) -> None:
            self._image_gradient = gradient

        return recording.track(self.images, store)
