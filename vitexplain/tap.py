"""The attention tap: sees attention where it is computed, whoever computes it.

A `TorchFunctionMode` is asked about torch calls inside watched modules. Calls of `scaled_dot_product_attention`
are handed on with their arguments; the fused kernel has run as usual. A call of `multi_head_attention_forward` (what
`nn.MultiheadAttention` computes with) hides its attention from every mode, so it is computed here from the same
arguments: input projection, `scaled_dot_product_attention`, output projection. Where a model writes its attention by
hand, the attention is what values are multiplied with: the left side of a product that comes from a softmax, through
whatever the model did to it in between. It is handed on in the place of that product.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention import Attention, AttentionOperands, GivenAttention
from .errors import CaptureError
from .scoped_mode import ScopedMode

Seen = Callable[[Attention, Tensor], Tensor]
"""Takes one attention and the tensor to track for it, its output (B, H, N, dh) or, where it was written by hand, A
itself (B, H, N, N); returns what the model goes on with."""

Instead = Callable[[AttentionOperands, "Sequence[Tensor] | None"], "Tensor | None"]
"""Computes the output (B, H, N, dh) of one attention in the place of the fused kernel, from its operands, and from q, k
and v on the model's graph where it called the kernel itself; None leaves it to the kernel."""

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_SOFTMAX = frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax})
_PRODUCT = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})


class AttentionTap(ScopedMode):
    """Hands the attention calls inside watched modules on; calls elsewhere pass untouched.

    Args:
        batch: images in the forward: how many matrices of one head a stack of them holds.

    Attributes:
        stacked: attention was seen on tensors of three axes, (B·H, N, …), and cut into images.
    """

    def __init__(self, batch: int = 1) -> None:
        super().__init__()
        self.stacked = False
        self._batch = batch
        self._inside: list[_Watched] = []

    def watch(
        self,
        module: nn.Module,
        seen: Seen,
        instead: Instead | None = None,
        between: tuple[nn.Module, nn.Module] | None = None,
    ) -> list[RemovableHandle]:
        """Hands calls inside a module to `seen`, unless `instead` takes them; the innermost watched module counts.

        Args:
            module: is watched.
            seen: takes its attention.
            instead: computes it, or leaves it to the kernel.
            between: a module inside it behind which attention is computed, and one before which it has been: what
                else the module calls is then not asked about, which is most of it.
        """

        def enter(*_: Any) -> None:
            self._inside.append(_Watched(seen, instead))
            self.switch(True)

        def leave(*_: Any) -> None:
            self._inside.pop()
            self.switch(bool(self._inside))

        if between is not None:
            before, behind = between
            return [before.register_forward_hook(enter), behind.register_forward_pre_hook(leave)]
        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        watched = self._inside[-1]
        if func is F.scaled_dot_product_attention:
            given = [*args[:3], *(named[name] for name in ("query", "key", "value")[len(args) :])]
            return self._fused(watched, attention_operands(*args, **named), lambda: func(*args, **named), given)
        if func is F.multi_head_attention_forward:
            return multi_head(functools.partial(self._fused, watched), *args, **named)
        if func in _SOFTMAX:
            watched.weights = [func(*args, **named)]
            return watched.weights[0]
        if not watched.weights or not any(watched.holds(each) for each in args):
            return func(*args, **named)
        written = _written_out(func, args)
        if written is not None and watched.holds(written.weights):
            watched.weights = []
            return func(*written.arguments(self._tracked(watched.seen, written)), **named)
        return watched.keep(func(*args, **named))

    def _fused(
        self,
        watched: _Watched,
        operands: AttentionOperands,
        kernel: Callable[[], Tensor],
        given: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """What the model goes on with instead of the output of the fused kernel, in its own shape."""
        if operands.q.ndim != 3:
            output = None if watched.instead is None else watched.instead(operands, given)
            return watched.seen(operands, kernel()) if output is None else output
        output = kernel()
        q, k, v = (self._unstacked(each) for each in (operands.q, operands.k, operands.v))
        bias = operands.bias
        if bias is not None and bias.ndim == 3:
            bias = self._unstacked(bias.expand(len(output), -1, -1))
        operands = replace(operands, q=q, k=k, v=v, bias=bias)
        return watched.seen(operands, self._unstacked(output)).reshape(output.shape)

    def _unstacked(self, tensor: Tensor) -> Tensor:
        """(B, H, N, …) of a head or B·H of them."""
        self.stacked = True
        images = self._batch if len(tensor) % self._batch == 0 else len(tensor)
        return tensor.reshape(images, -1, *tensor.shape[1:])

    def _tracked(self, seen: Seen, written: _WrittenOut) -> Tensor:
        """What the model goes on with instead of the weights, in their own shape."""
        matrix, values = written.weights, written.values
        if matrix.ndim == 3:
            matrix, values = self._unstacked(matrix), self._unstacked(values)
        values = values.expand(*matrix.shape[:2], -1, -1)  # heads may share them
        return seen(GivenAttention(matrix.detach(), values.detach()), matrix).reshape(written.weights.shape)


class _Watched:
    """One running call of a watched module.

    Attributes:
        seen: takes its attention.
        instead: computes it in the place of the fused kernel, or leaves it to that.
        weights: the last softmax, and what became of it so far.
    """

    def __init__(self, seen: Seen, instead: Instead | None) -> None:
        self.seen, self.instead = seen, instead
        self.weights: list[Tensor] = []

    def holds(self, value: Any) -> bool:
        """Whether a value is one of `weights`."""
        return any(value is each for each in self.weights)

    def keep(self, result: Any) -> Any:
        """Adds the result of an operation on weights, if it has as many entries."""
        if isinstance(result, Tensor) and result.numel() == self.weights[0].numel():
            self.weights.append(result)
        return result


class _WrittenOut(NamedTuple):
    """A product of attention weights (…, N, N) with values (…, N, dh), and its arguments with other weights."""

    weights: Tensor
    values: Tensor
    arguments: Callable[[Tensor], Sequence[Any]]


def _written_out(func: Callable[..., Any], args: Sequence[Any]) -> _WrittenOut | None:
    """The product that a call computes; None for other calls, and where it mixes no values."""
    if func in _PRODUCT and len(args) > 1:
        weights, values = args[:2]
        if min(weights.ndim, values.ndim) < 2:
            return None
        written = _WrittenOut(weights, values, lambda tracked: (tracked, *args[1:]))
    elif func is torch.einsum and len(args) == 3 and isinstance(args[0], str):
        equation, weights, values = args
        of_weights, of_values = equation.replace(" ", "").split("->")[0].split(",")
        width = set(of_values) - set(of_weights)
        if len(width) != 1 or set(of_weights[-2:]) & set(of_values) != {of_weights[-1:]}:
            return None
        order = f"{of_values}->{of_weights[:-2]}{of_weights[-1]}{width.pop()}"
        written = _WrittenOut(weights, torch.einsum(order, values), lambda tracked: (equation, tracked, values))
    else:
        return None
    (*_, keys), (*_, tokens, _width) = weights.shape, written.values.shape
    return written if weights.ndim in (3, 4) and written.values.ndim == weights.ndim and keys == tokens else None


def attention_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionOperands:
    """What a call of `scaled_dot_product_attention` with these arguments is given, detached."""
    q, k, v = query.detach(), key.detach(), value.detach()
    if enable_gqa:
        k, v = (tensor.repeat_interleave(q.shape[-3] // tensor.shape[-3], dim=-3) for tensor in (k, v))
    bias = None if attn_mask is None else attn_mask.detach()
    if is_causal:
        bias = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return AttentionOperands(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale), bias)


SDPA_SIGNATURE = inspect.signature(attention_operands)


def multi_head(
    fused: Callable[[AttentionOperands, Callable[[], Tensor]], Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What a call of `multi_head_attention_forward` with these arguments gives, computed from its parts.

    Args:
        fused: gives the attention output (B, H, N, dh), from the operands and the call that would compute it.
        *args: as of `torch.nn.functional.multi_head_attention_forward`.
        **kwargs: likewise.

    Raises:
        CaptureError: it is used with tokens that are no part of the image.
    """
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    unusual = [name for name in ("bias_k", "bias_v", "static_k", "static_v") if call[name] is not None]
    if unusual or call["add_zero_attn"]:
        raise CaptureError(
            f"nn.MultiheadAttention is used with {', '.join(unusual) or 'add_zero_attn'}, which adds tokens that "
            "are no part of the image; expected plain self-attention or attention pooling"
        )
    heads, inputs = call["num_heads"], [call[name] for name in ("query", "key", "value")]  # each (N, B, D)
    unbatched = inputs[0].ndim == 2
    if unbatched:
        inputs = [each[:, None] for each in inputs]
    if call["use_separate_proj_weight"]:
        weights = [call[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = call["in_proj_weight"].chunk(3)
    biases = [None] * 3 if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)
    q, k, v = (
        F.linear(each, weight, bias).reshape(*each.shape[:2], heads, -1).permute(1, 2, 0, 3)
        for each, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    bias = _merged_mask(call["attn_mask"], call["key_padding_mask"], q)
    output = fused(attention_operands(q, k, v, bias), lambda: F.scaled_dot_product_attention(q, k, v, bias))
    output = F.linear(output.permute(2, 0, 1, 3).flatten(2), call["out_proj_weight"], call["out_proj_bias"])
    weights_out = None
    if call["need_weights"]:
        weights_out = attention_operands(q, k, v, bias).probabilities().to(q.dtype)
        weights_out = weights_out.mean(1) if call["average_attn_weights"] else weights_out
    if unbatched:
        output, weights_out = output[:, 0], None if weights_out is None else weights_out[0]
    return output, weights_out


def _merged_mask(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive bias that broadcasts to (B, H, N, N) from both masks; True hides, in a boolean one of this API."""
    batch, heads = q.shape[:2]
    merged: Tensor | None = None
    if attention is not None:
        merged = _additive(attention, q.dtype)
        if merged.ndim == 3:  # (B·H, N, N)
            merged = merged.reshape(batch, heads, *merged.shape[1:])
    if padding is not None:  # (B, N)
        hidden = _additive(padding, q.dtype)[:, None, None, :]
        merged = hidden if merged is None else merged + hidden
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
