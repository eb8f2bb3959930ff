"""In which order tokens come, and what attention mixes: found by what moves where one patch of an image changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..layout import TokenLayout
from ..patch_pixels import Extent, patch_of_pixel

_SHARE = 1e-3
_MIXED = 0.1  # a norm over all tokens moves each a little


def bottom_left_changed(images: Tensor, grid: tuple[int, int], extent: Extent | None) -> Tensor:
    """The same images (B, C, H, W) with another patch at the bottom left of a grid (h, w), which takes up `extent`.

    Its pixels come from the bottom right: a model may take no others than the image has.
    """
    own = patch_of_pixel(images.shape[-2:], grid, extent) == (grid[0] - 1) * grid[1]
    return torch.where(own.to(images.device), images.flip(-1), images)


def check_order(before: Tensor, after: Tensor, layout: TokenLayout, again: Callable[[], Tensor]) -> None:
    """Prefix tokens come first and patches row by row: a change at the bottom left reaches one place most.

    Args:
        before: tokens (1, N, D) that enter the first block.
        after: the same with another patch at the bottom left of the image.
        layout: theirs.
        again: gives what `before` is in one more forward of the same image; asked where most tokens moved.

    Raises:
        UnsupportedModelError: the patch is another token, or reaches the prefix, or tokens are others each time.
    """
    moved = rows_moved(before, after)
    limit = _MIXED * moved.max()
    if 2 * int((moved > limit).sum()) > len(moved) and bool((rows_moved(before, again()) > limit).any()):
        raise UnsupportedModelError(
            "two forwards of one image give the first block other tokens, or the same in another order (as in masked "
            "autoencoders, which draw it); expected what depends on the image alone. Take the class that classifies "
            "(transformers: ViTForImageClassification takes ViTMAEModel's weights), or wrap the model so that nothing "
            "is drawn (ViTMAEModel: pass noise=torch.arange(patches)[None].expand(len(images), -1) and mask_ratio=0)"
        )
    prefix, (h, w) = layout.prefix, layout.grid
    expected = prefix + (h - 1) * w
    reached = bool((moved[:prefix] > _SHARE * moved.max()).any())
    if reached or len(moved) != layout.count or int(moved.argmax()) != expected:
        raise UnsupportedModelError(
            f"the bottom left patch is token {int(moved.argmax())} of {len(moved)}; expected {expected} of "
            f"{layout.count}, after {prefix} prefix tokens, with patches row by row. Another order needs a ModelAdapter"
        )


def check_values(before: Tensor, after: Tensor, values: Tensor, changed: Tensor) -> None:
    """Attention mixes tokens, not channels, and in the order of the block: where a token moved, its own value does.

    A few around it may, as where a block convolves its tokens before it makes values of them.

    Args:
        before: tokens (1, N, D) that enter a block.
        after: the same of another image.
        values: of its attention (1, H, N, dh).
        changed: the same of the other image.

    Raises:
        UnsupportedModelError: its own value stayed, or most of the others moved.
    """
    tokens, values_moved = rows_moved(before, after), rows_moved(values.flatten(0, 1), changed.flatten(0, 1))
    moved = values_moved > _MIXED * values_moved.max()
    stayed = tokens <= _SHARE * tokens.max()
    rows, own = int(moved[stayed].sum()), int(tokens.argmax())
    if not moved[own] or 2 * rows > int(stayed.sum()):
        raise UnsupportedModelError(
            f"where the patch of token {own} changed, {rows} values of attention moved that belong to other tokens, "
            f"and its own {'too' if moved[own] else 'did not'}: attention runs over channels, or over tokens in "
            "another order; expected the block's own tokens. Such models need a ModelAdapter"
        )


def rows_moved(before: Tensor, after: Tensor) -> Tensor:
    """(N,) how far each row of states (…, N, D) moved, at most."""
    moved = (before - after).abs().float()
    return moved.amax((0, 2))
