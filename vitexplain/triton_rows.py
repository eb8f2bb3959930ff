"""Triton kernels: a row vector times positive gradient-weighted attention, without an N×N matrix in memory.

    A = softmax(scale · q kᵀ),    G = dO vᵀ,    out_j = Σ_i row_i · max(Σ_h A_ij G_ij, 0)

the sum over heads being over one head or over all. A program owns a block of keys j and goes through the query rows i,
so that nothing is added up from several programs and the result is the same every time. Sums are in float32.

Imported where Triton is installed alone; `vitexplain.fused_rows` says when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Query rows and keys of a tile."""

_kernel: Callable[[Callable[..., None]], Any] = triton.jit


@_kernel
def _log_sums(
    q: Any,
    k: Any,
    out: Any,
    scale: Any,
    heads: Any,
    rows: Any,
    keys: Any,
    width: Any,
    q_image: Any,
    q_head: Any,
    q_token: Any,
    k_image: Any,
    k_head: Any,
    k_token: Any,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """log Σ_j exp(scale · q_i·k_j) of each query row: what its softmax is divided by."""
    pair = tl.program_id(1)
    image, head = pair // heads, pair % heads
    i, d = tl.program_id(0) * block_rows + tl.arange(0, block_rows), tl.arange(0, block_width)
    inside = (d < width)[None, :]
    queries = q + image * q_image + head * q_head + i[:, None] * q_token + d[None, :]
    query = tl.load(queries, mask=(i < rows)[:, None] & inside, other=0.0)
    highest = tl.full((block_rows,), float("-inf"), tl.float32)
    total = tl.zeros((block_rows,), tl.float32)
    for start in range(0, keys, block_keys):
        j = start + tl.arange(0, block_keys)
        known = k + image * k_image + head * k_head + j[:, None] * k_token + d[None, :]
        key = tl.load(known, mask=(j < keys)[:, None] & inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((j < keys)[None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp(highest - risen) + tl.sum(tl.exp(scores - risen[:, None]), 1)
        highest = risen
    tl.store(out + pair * rows + i, highest + tl.log(total), mask=i < rows)


@_kernel
def _positive_row(
    row: Any,
    q: Any,
    k: Any,
    v: Any,
    gradient: Any,
    log_sums: Any,
    out: Any,
    scale: Any,
    heads: Any,
    rows: Any,
    keys: Any,
    width: Any,
    q_image: Any,
    q_head: Any,
    q_token: Any,
    k_image: Any,
    k_head: Any,
    k_token: Any,
    v_image: Any,
    v_head: Any,
    v_token: Any,
    g_image: Any,
    g_head: Any,
    g_token: Any,
    sum_heads: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """out_j of one image and head, or of one image and the sum over its heads."""
    place = tl.program_id(1)
    image = place if sum_heads else place // heads
    first = 0 if sum_heads else place % heads
    last = heads if sum_heads else first + 1
    j, d = tl.program_id(0) * block_keys + tl.arange(0, block_keys), tl.arange(0, block_width)
    inside, known = (d < width)[None, :], (j < keys)[:, None]
    total = tl.zeros((block_keys,), tl.float32)
    for start in range(0, rows, block_rows):
        i = start + tl.arange(0, block_rows)
        asked = (i < rows)[:, None] & inside
        relevance = tl.load(row + image * rows + i, mask=i < rows, other=0.0)
        if tl.max(tl.abs(relevance), 0) > 0:  # rows without relevance add nothing
            weights = tl.zeros((block_rows, block_keys), tl.float32)
            for head in range(first, last):
                query = tl.load(
                    q + image * q_image + head * q_head + i[:, None] * q_token + d[None, :], mask=asked, other=0.0
                )
                key = tl.load(
                    k + image * k_image + head * k_head + j[:, None] * k_token + d[None, :],
                    mask=known & inside,
                    other=0.0,
                )
                value = tl.load(
                    v + image * v_image + head * v_head + j[:, None] * v_token + d[None, :],
                    mask=known & inside,
                    other=0.0,
                )
                slope = tl.load(
                    gradient + image * g_image + head * g_head + i[:, None] * g_token + d[None, :],
                    mask=asked,
                    other=0.0,
                )
                log_sum = tl.load(log_sums + (image * heads + head) * rows + i, mask=i < rows, other=0.0)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
                attention = tl.exp(scores - log_sum[:, None])
                weights += attention * tl.dot(slope, tl.trans(value), input_precision="ieee")
            total += tl.sum(relevance[:, None] * tl.maximum(weights, 0.0), 0)
    tl.store(out + place * keys + j, total, mask=j < keys)


def positive_row(
    row: Tensor, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float, *, sum_heads: bool
) -> Tensor:
    """The row times (G∘A)+, head by head, or times (Σ_h G∘A)+.

    Args:
        row: (B, N).
        q: queries (B, H, N, dh); as `k`, `v` and `gradient` float32 or a half precision.
        k: keys (B, H, N, dh).
        v: values (B, H, N, dh).
        gradient: dy/dO (B, H, N, dh).
        scale: factor on q kᵀ.
        sum_heads: weigh by the sum over heads.

    Returns:
        float32 (B, H, N), or (B, N) with `sum_heads`.
    """
    q, k, v, gradient = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v, gradient))
    gradient = gradient.to(v.dtype)
    row = row.float().contiguous()
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    blocks = {
        "block_rows": BLOCK,
        "block_keys": BLOCK,
        "block_width": max(16, triton.next_power_of_2(width)),  # tensor cores take no fewer
    }
    log_sums = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    out = torch.empty((batch, keys) if sum_heads else (batch, heads, keys), dtype=torch.float32, device=q.device)
    sizes = (scale, heads, rows, keys, width)
    _log_sums[triton.cdiv(rows, BLOCK), batch * heads](q, k, log_sums, *sizes, *_strides(q, k), **blocks)
    _positive_row[triton.cdiv(keys, BLOCK), batch if sum_heads else batch * heads](
        row, q, k, v, gradient, log_sums, out, *sizes, *_strides(q, k, v, gradient), sum_heads=sum_heads, **blocks
    )
    return out


def _strides(*tensors: Tensor) -> list[int]:
    return [step for each in tensors for step in each.stride()[:3]]
