"""The algebra: row recursion against dense products, recomputed attention and gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitexplain import attention
from vitexplain.attention import AttentionOperands, RowTile, propagate, row_tiles


def operands(
    batch: int, heads: int, tokens: int, width: int, seed: int = 0, bias: Tensor | None = None
) -> AttentionOperands:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return AttentionOperands(q, k, v, width**-0.5, bias)


def dense_attention(given_: AttentionOperands) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", given_.q, given_.k) * given_.scale
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 12),
    blocks=st.integers(1, 5),
    tile=st.integers(1, 14),
    sparse=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_row_recursion_equals_the_dense_product(
    batch: int, heads: int, tokens: int, blocks: int, tile: int, sparse: bool, seed: int
) -> None:
    """r · Π (I + E_h[(G)+∘A]) and r · Π rownorm(E_h A + I), tile by tile and as N×N matrices, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layers = [operands(batch, heads, tokens, 3, seed + index) for index in range(blocks)]
    gradients = [torch.randn(batch, heads, tokens, 3, generator=generator, dtype=torch.float64) for _ in layers]
    row = torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
    if sparse:
        row = torch.zeros_like(row)
        row[:, seed % tokens] = 1.0

    identity = torch.eye(tokens, dtype=torch.float64).expand(batch, -1, -1)
    generic, rollout = identity, identity
    for layer, gradient in zip(layers, gradients, strict=True):
        attended = dense_attention(layer)
        positive = (gradient @ layer.v.transpose(-2, -1)).clamp(min=0)
        generic = (identity + (positive * attended).mean(1)) @ generic
        mixed = attended.mean(1) + identity
        rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout

    by_generic, by_rollout = row, row
    for layer, gradient in zip(reversed(layers), reversed(gradients), strict=True):
        by_generic = by_generic + propagate(
            by_generic,
            layer,
            lambda each: (each.gradient.clamp(min=0) * each.attention).mean(1),
            output_gradient=gradient,
            tile_rows=tile,
        )
        by_rollout = (
            by_rollout + propagate(by_rollout, layer, lambda each: each.attention, tile_rows=tile).mean(1)
        ) / 2
    torch.testing.assert_close(by_generic, (row[:, None] @ generic)[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_rollout, (row[:, None] @ rollout)[:, 0], rtol=1e-10, atol=1e-12)


def test_probabilities_and_gradient_equal_autograd() -> None:
    given_ = operands(2, 3, 7, 4)
    probabilities = dense_attention(given_).requires_grad_(True)
    output = probabilities @ given_.v
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    score = (torch.tanh(output) * weight).sum()
    by_attention, by_output = torch.autograd.grad(score, [probabilities, output])
    torch.testing.assert_close(given_.probabilities(), probabilities.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(given_.gradient(by_output), by_attention, rtol=1e-12, atol=1e-14)


def test_rows_are_rows() -> None:
    given_ = operands(2, 3, 9, 4)
    whole = given_.probabilities()
    torch.testing.assert_close(given_.probabilities(slice(2, 5)), whole[:, :, 2:5])
    chosen = torch.tensor([7, 0])
    torch.testing.assert_close(given_.probabilities(chosen), whole[:, :, chosen])


@pytest.mark.parametrize("kind", ["additive", "boolean", "broadcast"])
def test_bias_and_mask_follow_their_rows(kind: str) -> None:
    bias = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    if kind == "boolean":
        bias = bias > -0.5
        bias[..., 0] = True
    if kind == "broadcast":
        bias = bias[:1, :1, :1]
    given_ = operands(2, 3, 5, 4, bias=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(given_.q, given_.k, given_.v, attn_mask=bias)
    torch.testing.assert_close(given_.probabilities() @ given_.v, expected)
    torch.testing.assert_close(given_.probabilities(slice(1, 4)), given_.probabilities()[:, :, 1:4])


def test_half_precision_is_computed_in_float32() -> None:
    exact = operands(1, 2, 6, 4)
    half = AttentionOperands(exact.q.bfloat16(), exact.k.bfloat16(), exact.v.bfloat16(), exact.scale)
    assert half.probabilities().dtype == torch.float32
    torch.testing.assert_close(half.probabilities().sum(-1), torch.ones(1, 2, 6))
    assert propagate(torch.ones(1, 6), half, lambda tile: tile.attention).dtype == torch.float32


def test_only_rows_of_the_support_are_computed() -> None:
    given_ = operands(2, 2, 8, 3)
    seen: list[int] = []

    def weigh(tile: RowTile) -> Tensor:
        seen.extend(range(8)[tile.rows] if isinstance(tile.rows, slice) else tile.rows.tolist())
        return tile.attention

    row = torch.zeros(2, 8, dtype=torch.float64)
    row[0, 2], row[1, 5] = 1.0, 1.0
    product = propagate(row, given_, weigh)
    assert sorted(seen) == [2, 5]
    torch.testing.assert_close(product, torch.stack([given_.probabilities()[0, :, 2], given_.probabilities()[1, :, 5]]))


def test_a_row_of_zeros_gives_zeros() -> None:
    given_ = operands(2, 3, 8, 3)
    assert propagate(torch.zeros(2, 8), given_, lambda tile: tile.attention).shape == (2, 3, 8)
    assert not propagate(torch.zeros(2, 8), given_, lambda tile: tile.attention.mean(1)).any()


def test_tiles_cover_all_rows_once_and_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = operands(2, 3, 50, 3)
    monkeypatch.setattr(attention, "TILE_BYTES", 4 * 2 * 3 * 50 * 7)
    tiles = list(row_tiles(given_))
    assert [each for tile in tiles for each in range(50)[tile]] == list(range(50))
    assert max(tile.stop - tile.start for tile in tiles) == 7
    monkeypatch.setattr(attention, "TILE_BYTES", 1)
    assert len(list(row_tiles(given_))) == 50
