"""Capture: what a forward (and backward) pass through a borrowed model leaves for the methods.

Forward hooks bring the token states. Attention is read where it is computed, from the arguments of
`scaled_dot_product_attention` inside the hooked attention modules, so the fused kernel keeps running and no model
is patched. Weights are frozen meanwhile, and the autograd graph starts at the first tensor whose gradient is asked
for: whatever lies below it is an ordinary forward without a graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import AttentionOperands
from .borrowing import borrowed
from .errors import CaptureError
from .models import adapt
from .models.adapter import ModelAdapter
from .record import BlockRecord, Needs, State

_SDPA_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": inspect.Parameter.empty,
            "key": inspect.Parameter.empty,
            "value": inspect.Parameter.empty,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)


class Capture:
    """One forward pass of a borrowed model and as many backward passes as there are targets.

    ::

        with Capture(model, Needs(attention_gradient=True)) as capture:
            logits = capture.forward(images)
            capture.backward(logits[:, 281].sum())
            capture.blocks[-1].attention_gradient()

    The model is in evaluation mode with frozen weights inside the `with`, and as it was before after it. Not for
    use from several threads on the same model at once.

    Attributes:
        adapter: the model's adapter.
        needs: what is recorded.
        blocks: one record a block, L in all; those below `needs.from_block` stay empty.
        images: the (B, channels, H, W) input of the forward pass.
        logits: the model's output (B, C), detached.
        grid: patch grid (h, w).
    """

    images: Tensor
    logits: Tensor
    grid: tuple[int, int]

    def __init__(self, model: nn.Module | ModelAdapter, needs: Needs) -> None:
        self.adapter = adapt(model)
        self.needs = needs
        self.blocks: list[BlockRecord] = []
        self._tracked: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._context: ExitStack | None = None

    def __enter__(self) -> Capture:
        self._context = ExitStack()
        # inside a caller's inference_mode no graph could be recorded
        self._context.enter_context(torch.inference_mode(False))
        self._context.enter_context(torch.set_grad_enabled(self.needs.gradient))
        self._context.enter_context(borrowed(self.adapter.model, fused_attention=self.adapter.fused_switches()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None
        self._tracked.clear()  # lets go of the graph; the records stay readable

    @property
    def num_tokens(self) -> int:
        """N: prefix tokens and patch tokens."""
        return self.adapter.num_prefix_tokens + self.grid[0] * self.grid[1]

    def seed_row(self) -> Tensor:
        """Where a rollout starts: the weight (B, N) with which the head reads each final token."""
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
        self.grid = self.adapter.grid((self.images.shape[-2], self.images.shape[-1]))
        self.blocks = [BlockRecord(index, self.adapter) for index in range(len(self.adapter.blocks))]
        with ExitStack() as hooks:
            for handle in self._place_hooks(hooks):
                hooks.callback(handle.remove)
            output = self.adapter.model(self.images)
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CaptureError(f"the model returned {shape}; expected logits of shape (B, C), one row an image")
        self._check_records()
        self.logits = output.detach()
        return output

    def backward(self, score: Tensor, *, retain_graph: bool = False) -> None:
        """Fills the records' gradients with those of one score; the model's own `.grad` is not touched.

        Args:
            score: () scalar made of the output of `forward`. Images of a batch do not interact, so the sum over
                the batch gives each image its own gradient.
            retain_graph: keep the graph for a further target.

        Raises:
            CaptureError: the score does not depend on the model's output.
        """
        if not score.requires_grad or not self._tracked:
            raise CaptureError(
                "the score carries no gradient: make it of the logits that Capture.forward returned, with "
                "differentiable operations, and ask for gradients in Needs"
            )
        tensors = [tensor for tensor, _ in self._tracked]
        gradients = torch.autograd.grad(score, tensors, retain_graph=retain_graph, allow_unused=True)
        for (tensor, store), gradient in zip(self._tracked, gradients, strict=True):
            store(torch.zeros_like(tensor) if gradient is None else gradient)

    def _place_hooks(self, stack: ExitStack) -> list[Any]:
        handles: list[Any] = []
        tap = _AttentionTap(self._record_attention)
        first = self.needs.from_block
        for record, taps in list(zip(self.blocks, self.adapter.blocks, strict=True))[first:]:
            if self.needs.any_attention:
                handles += tap.watch(taps.attention, record)
            for kind in self.needs.states | self.needs.state_gradients:
                handles.append(self._watch_state(kind, record))
        if self.needs.any_attention:
            stack.enter_context(tap)
        return handles

    def _watch_state(self, kind: State, record: BlockRecord) -> Any:
        taps = self.adapter.blocks[record.index]
        module = taps.block if kind in ("in", "out") else getattr(taps, kind)
        if module is None:
            raise CaptureError(f"block {record.index} ({type(taps.block).__name__}) has no token state {kind!r}")

        def keep(state: Tensor) -> Tensor:
            if kind in self.needs.state_gradients:

                def store(gradient: Tensor) -> None:
                    record._state_gradients[kind] = gradient

                state = self._track(state, store)
            record._states[kind] = state.detach()
            return state

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (keep(arguments[0]), *arguments[1:])

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            return keep(output)

        return (
            module.register_forward_pre_hook(before) if kind in ("in", "mid") else module.register_forward_hook(after)
        )

    def _record_attention(self, record: BlockRecord, operands: AttentionOperands, output: Tensor) -> Tensor:
        if record._operands is not None:
            raise CaptureError(f"block {record.index} computed attention twice in one forward; expected once")
        record._operands = operands
        if not self.needs.attention_gradient:
            return output

        def store(gradient: Tensor) -> None:
            record._output_gradient = gradient

        return self._track(output, store)

    def _track(self, tensor: Tensor, store: Callable[[Tensor], None]) -> Tensor:
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_(True)
        self._tracked.append((tensor, store))
        return tensor

    def _check_records(self) -> None:
        tokens = self.num_tokens
        for record in self.blocks[self.needs.from_block :]:
            operands = record._operands
            if self.needs.any_attention and operands is None:
                name = type(self.adapter.blocks[record.index].attention).__name__
                raise CaptureError(
                    f"block {record.index}'s attention ({name}) did not call scaled_dot_product_attention, so there is "
                    "nothing to read: use an implementation that does, or a method without attention such as gradcam"
                )
            if operands is not None and operands.num_tokens != tokens:
                raise CaptureError(
                    f"block {record.index} attends over {operands.num_tokens} tokens; expected {tokens} = "
                    f"{self.adapter.num_prefix_tokens} prefix tokens + {self.grid[0]}×{self.grid[1]} patches"
                )


class _AttentionTap(TorchFunctionMode):
    """Sees every call of scaled dot-product attention and passes those inside watched modules on."""

    def __init__(self, record: Callable[[BlockRecord, AttentionOperands, Tensor], Tensor]) -> None:
        super().__init__()
        self._record = record
        self._inside: list[BlockRecord] = []

    def watch(self, module: nn.Module, record: BlockRecord) -> Sequence[Any]:
        def enter(*_: Any) -> None:
            self._inside.append(record)

        def leave(*_: Any) -> None:
            self._inside.pop()

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self._inside:
            return self._record(self._inside[-1], _operands(args, kwargs or {}), output)
        return output


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionOperands:
    bound = _SDPA_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    q, k, v = (call[name].detach() for name in ("query", "key", "value"))
    if call["enable_gqa"]:
        k, v = (tensor.repeat_interleave(q.shape[-3] // tensor.shape[-3], dim=-3) for tensor in (k, v))
    bias = call["attn_mask"]
    if call["is_causal"]:
        bias = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scale = q.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
    return AttentionOperands(q, k, v, float(scale), None if bias is None else bias.detach())
