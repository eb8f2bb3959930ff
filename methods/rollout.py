"""Attention rollout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from vitexplain.attention import Rows
from vitexplain.fusion import FUSE, Fusion, discard_lowest
from vitexplain.method import ProductMethod
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method


@register_method(
    "rollout",
    title="Attention rollout",
    paper="Abnar & Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, sec. 3",
    class_specific=False,
    passes="1F",
    aliases=("attention_rollout",),
)
@dataclass(frozen=True)
class Rollout(ProductMethod):
    r"""How much of each input token reaches the head when attention is followed through all blocks.

    .. math:: \hat A_l = \mathrm{rownorm}((1-\alpha)\,\mathrm{fuse}_h A_{l,h} + \alpha I), \quad
        m = s\,\hat A_L \cdots \hat A_1

    with s the seed row and α = 0.5: the same as rownorm(A + I). Scores (B, N) >= 0, sum 1 for mean fusion.
    `head_fusion`, `discard_ratio` and `normalisation="column"` are those of the public vit-explain code, whose
    normalisation divides each column j by the sum of row j; `"row"` makes every factor a stochastic matrix, as in
    the paper. `discard_ratio` needs one block's fused N×N attention at a time; otherwise only row tiles are held, or,
    on the CPU, where tokens are so few that it takes less than queries and keys, one fused matrix a block
    (`vitexplain.fusion`).
    """

    head_fusion: str = option("mean", "how the heads of a block become one matrix", choices=("mean", "max", "min"))
    discard_ratio: float = option(0.0, "share of each block's smallest fused weights set to 0", minimum=0, maximum=0.99)
    residual: float = option(0.5, "weight of the skip connection against attention", minimum=0, maximum=0.99)
    normalisation: str = option("row", "what is divided by the row sums", choices=("row", "column"))

    @property
    def needs(self) -> Needs:
        """One matrix of every block from `start_layer` on, its heads fused."""
        return replace(super().needs, fusion=cast("Fusion", self.head_fusion))

    def block_update(self, row: Tensor, block: BlockRecord) -> Tensor:
        """`row` · Â of this block."""
        fuse = FUSE[self.head_fusion]
        if self.discard_ratio == 0 and self.normalisation == "row":
            if self.head_fusion == "mean" and block.operands.stochastic:  # a mean of distributions is one
                return block.follow(row, lambda tile: tile.attention, self.residual)
            return block.propagate(row, lambda tile: self._factor(fuse(tile.attention, 1), tile.rows))
        fused = torch.cat([fuse(tile.attention, 1) for tile in block.tiles()], dim=1)
        factor = self._factor(self._discard(fused), slice(None))
        return (row.to(factor.dtype)[:, None] @ factor)[:, 0]

    def _factor(self, fused: Tensor, rows: Rows) -> Tensor:
        """Rows (B, T, N) of Â, from the same rows of the fused attention."""
        columns = torch.arange(fused.shape[2], device=fused.device)[rows]
        mixed = (1 - self.residual) * fused
        mixed[:, torch.arange(len(columns), device=fused.device), columns] += self.residual
        sums = mixed.sum(2)
        sums = torch.where(sums == 0, 1.0, sums)  # a row of which everything was discarded stays zero
        return mixed / (sums[:, :, None] if self.normalisation == "row" else sums[:, None])

    def _discard(self, fused: Tensor) -> Tensor:
        kept = discard_lowest(fused, self.discard_ratio)
        kept[:, 0, 0] = fused[:, 0, 0]  # CLS to CLS is never discarded
        return kept
