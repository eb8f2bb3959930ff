"""Colours looked up and mixed where heatmaps are, so that a GPU hands over finished pictures.

The same pictures as those of `vitexplain.render` on the CPU, to one level of 255 where rounding decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def paint(indices: Tensor, table: npt.NDArray[Any]) -> Tensor:
    """Looks colours up.

    Args:
        indices: uint8 (..., H, W).
        table: uint8 RGB (256, 3).

    Returns:
        uint8 (..., H, W, 3) on the device of `indices`.
    """
    return torch.tensor(table, device=indices.device)[indices.long()]


def paint_over(
    pictures: npt.NDArray[Any], indices: Tensor, table: npt.NDArray[Any], opacity: npt.NDArray[Any]
) -> Tensor:
    """Mixes looked-up colours with pictures.

    Args:
        pictures: uint8 RGB (..., H, W, 3).
        indices: uint8 (..., H, W).
        table: uint8 RGB (256, 3).
        opacity: of the colour of each index, in [0, 1], (256,).

    Returns:
        uint8 (..., H, W, 3) on the device of `indices`.
    """
    weights = torch.tensor(opacity, dtype=torch.float32, device=indices.device)[indices.long()][..., None]
    photograph = torch.tensor(np.ascontiguousarray(pictures), device=indices.device)
    return torch.lerp(photograph.float(), paint(indices, table).float(), weights).round_().to(torch.uint8)
