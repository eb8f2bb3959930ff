"""Correlations of rows, undefined where a row is flat."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Linear correlation of rows (…, n) with rows of the same shape, (…) in [-1, 1]; NaN where either is flat."""
    flat = (first.amax(-1) == first.amin(-1)) | (second.amax(-1) == second.amin(-1))
    first, second = (rows - rows.mean(-1, keepdim=True) for rows in (first.double(), second.double()))
    correlation: Tensor = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    return correlation.clamp(-1, 1).masked_fill(flat, torch.nan)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of rows (…, n), equal values sharing their mean rank, (…) in [-1, 1]; NaN where either is flat.

    NaN also where a row holds NaN.
    """
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.detach().cpu().numpy(), axis=-1)).to(values.device)
