"""The random masks of RISE: coarse cells kept by chance, enlarged smoothly and shifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .randomness import DRAWN


@dataclass(frozen=True, eq=False)
class RandomMasks:
    """M masks for images of one size, made when asked for: a few bits each are all that is kept.

    Cells are as square as the image allows. One row and one column of them more than the image needs leave room for
    the shift, which is less than a cell.

    Attributes:
        size: (H, W) pixels.
        bits: (M, rows + 1, columns + 1), 1 where a cell is kept.
        shifts: (M, 2) int64, pixels by which each mask is moved up and left.
        cell: (height, width) of a cell, in pixels.
    """

    size: tuple[int, int]
    bits: Tensor
    shifts: Tensor
    cell: tuple[int, int]

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], cells: int, probability: float, seed: int) -> RandomMasks:
        """Draws on the CPU, from a generator of its own.

        Args:
            count: M.
            size: (H, W) pixels.
            cells: along the shorter side.
            probability: that a cell is kept.
            seed: of the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        side = max(min(size) / cells, 1)
        rows, columns = (max(round(length / side), 1) for length in size)
        bits = (torch.rand(count, rows + 1, columns + 1, generator=generator, **DRAWN) < probability).float()
        cell = (-(-size[0] // rows), -(-size[1] // columns))
        shifts = [torch.randint(length, (count,), generator=generator, device="cpu") for length in cell]
        return cls(size, bits, torch.stack(shifts, 1), cell)

    def __call__(self, numbers: Tensor) -> Tensor:
        """The masks of some numbers (n,): (n, H, W) float32 in [0, 1], on the numbers' device."""
        bits, shifts = (each[numbers.cpu()].to(numbers.device) for each in (self.bits, self.shifts))
        places = []
        for axis, length in enumerate(self.size):
            pixels = (torch.arange(length, device=numbers.device) + shifts[:, axis, None]).float()
            # -1 and 1 are the outer edges of the enlarged mask, a pixel's place is its centre
            places.append((2 * pixels + 1) / (self.cell[axis] * bits.shape[axis + 1]) - 1)
        shape = (len(numbers), *self.size)
        grid = torch.stack([places[1][:, None, :].expand(shape), places[0][:, :, None].expand(shape)], -1)
        return F.grid_sample(bits[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
