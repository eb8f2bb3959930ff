"""A row vector times weighed attention: one fused kernel on a GPU that has one for it, tiles of attention elsewhere.

The kernel (`vitexplain.triton_rows`) is checked on the CPU, by Triton's interpreter, against the tiles that it
replaces, in single and in half precision; bfloat16 the interpreter cannot multiply. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from .attention import Attention, AttentionOperands, RowTile, propagate

Weigh = Callable[[RowTile], Tensor]
_Weigh = TypeVar("_Weigh", bound=Weigh)

_WIDEST = 128
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
_SUM_HEADS: dict[Weigh, bool] = {}


def has_kernel(*, sum_heads: bool) -> Callable[[_Weigh], _Weigh]:
    """Marks a function that weighs tiles by (G∘A)+, or by (Σ_h G∘A)+ with `sum_heads`: the kernel computes the same."""

    def mark(weigh: _Weigh) -> _Weigh:
        _SUM_HEADS[weigh] = sum_heads
        return weigh

    return mark


def propagate_row(row: Tensor, operands: Attention, weigh: Weigh, *, output_gradient: Tensor | None = None) -> Tensor:
    """As `attention.propagate`, by the kernel where there is one for `weigh`, the device and the attention.

    Args:
        row: (B, N), or (B, R, N).
        operands: the attention.
        weigh: maps a `RowTile` to (B, H, T, N) or (B, T, N).
        output_gradient: dy/dO (B, H, N, dh), where `weigh` reads it.
    """
    if output_gradient is not None and row.is_cuda and takes(row, operands, weigh):
        assert isinstance(operands, AttentionOperands)
        from .triton_rows import positive_row

        parts = operands.q, operands.k, operands.v, output_gradient
        return positive_row(row, *parts, operands.scale, sum_heads=_SUM_HEADS[weigh])
    return propagate(row, operands, weigh, output_gradient=output_gradient)


def takes(row: Tensor, operands: Attention, weigh: Weigh) -> bool:
    """Whether the kernel computes this, on a GPU: plain softmax attention, one row an image, known weights."""
    return (
        weigh in _SUM_HEADS
        and type(operands) is AttentionOperands
        and operands.bias is None
        and row.ndim == 2
        and operands.q.dtype in _PRECISIONS
        and max(operands.q.shape[-1], operands.v.shape[-1]) <= _WIDEST
        and operands.q.shape[:2] == operands.k.shape[:2] == operands.v.shape[:2]
        and operands.q.shape[-1] == operands.v.shape[-1]
        and _triton_found()
    )


@cache
def _triton_found() -> bool:
    return find_spec("triton") is not None
