"""The fused kernel, run by Triton's interpreter on the CPU, against the tiles that it replaces on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitexplain.attention import AttentionOperands, RowTile, propagate
from vitexplain.fused_rows import has_kernel, takes
from vitexplain.methods.contributions import positive_contributions
from vitexplain.methods.generic_attention import positive_gradient_attention

ROOT = Path(__file__).resolve().parents[1]

INTERPRETED = """
import sys
import torch
from vitexplain.triton_rows import positive_row

cases = torch.load(sys.argv[1], weights_only=True)
torch.save([positive_row(*case["tensors"], case["scale"], sum_heads=case["sum_heads"]) for case in cases], sys.argv[2])
"""


def operands(*, tokens: int = 37, width: int = 20, dtype: torch.dtype = torch.float32) -> AttentionOperands:
    """Operands whose memory is that of one product, split into q, k and v, as models have it."""
    generator = torch.Generator().manual_seed(tokens)
    together = torch.randn(2, tokens, 3, 3, width, generator=generator).to(dtype)
    q, k, v = together.permute(2, 0, 3, 1, 4)
    return AttentionOperands(q, k, v, width**-0.5)


def rows(tokens: int) -> Tensor:
    return torch.rand(2, tokens, generator=torch.Generator().manual_seed(1))


def seeds(tokens: int) -> Tensor:
    return torch.eye(1, tokens).expand(2, tokens)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with PyTorch for Linux and GPUs alone")
def test_the_kernel_is_what_tiles_give(tmp_path: Path) -> None:
    cases, expected = [], []
    for tokens, width, dtype in ((37, 20, torch.float32), (130, 64, torch.float32), (65, 32, torch.float16)):
        each = operands(tokens=tokens, width=width, dtype=dtype)
        gradient = torch.randn(each.q.shape, generator=torch.Generator().manual_seed(2))
        for row in (rows(tokens), seeds(tokens)):
            for weigh, sum_heads in ((positive_gradient_attention, False), (positive_contributions, True)):
                assert takes(row, each, weigh)
                tensors = [row, each.q, each.k, each.v, gradient]
                cases.append({"tensors": tensors, "scale": each.scale, "sum_heads": sum_heads})
                expected.append(propagate(row, each, weigh, output_gradient=gradient.to(dtype)))
    torch.save(cases, tmp_path / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(tmp_path / "cases.pt"), str(tmp_path / "found.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_what_the_kernel_does_not_compute_is_left_to_tiles() -> None:
    each, row = operands(), rows(37)
    assert not takes(row, each, lambda tile: tile.attention)
    assert not takes(row[:, None], each, positive_gradient_attention)  # several rows an image
    assert not takes(row, operands(dtype=torch.float64), positive_gradient_attention)
    assert not takes(row, operands(width=200), positive_gradient_attention)
    masked = AttentionOperands(each.q, each.k, each.v, each.scale, torch.zeros(37, 37))
    assert not takes(row, masked, positive_gradient_attention)


def test_a_function_is_marked_and_stays_what_it_is() -> None:
    def weigh(tile: RowTile) -> Tensor:
        return tile.attention

    assert has_kernel(sum_heads=True)(weigh) is weigh
    assert takes(rows(37), operands(), weigh)
