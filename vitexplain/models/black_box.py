"""Adapter of graphs that cannot be looked into: the logits of images, and a patch grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from .adapter import BlockModules
from .limited import LimitedAdapter

if TYPE_CHECKING:
    from ..needs import Needs


class BlackBoxAdapter(LimitedAdapter):
    """A model that is only asked for logits and their gradient at the image.

    Args:
        model: called with images (B, channels, H, W), returns logits (B, C).
        image_shape: what it takes (channels, H, W), in pixels.
        grid: patches (h, w) that maps are made of; nothing in the model depends on them.
        batch: the one number of images that it takes; others are cut, and filled up with images whose logits nobody
            reads. None for a model that takes any.
        reason: why nothing more is known of it.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: tuple[int, int, int],
        grid: tuple[int, int],
        *,
        batch: int | None = None,
        reason: str = "its blocks are not known",
    ) -> None:
        super().__init__(model, image_shape[1:])
        self._channels, self._grid, self.batch, self._reason = image_shape[0], grid, batch, reason
        self.blocks = (BlockModules(model, model),)

    @property
    def num_channels(self) -> int:
        """Channels that the model was exported with."""
        return self._channels

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The patch grid (h, w).

        Raises:
            InputError: images of another size.
        """
        if tuple(image_size) != tuple(self._probe_size):
            raise InputError(
                f"found images of {image_size[0]}×{image_size[1]} pixels, expected {self._probe_size[0]}×"
                f"{self._probe_size[1]}, the size that the model was exported with"
            )
        return self._grid

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, C), of as many images at a time as the model takes."""
        if self.batch is None:
            return super().logits(images)
        parts = []
        for part in images.split(self.batch):  # type: ignore[no-untyped-call]
            missing = self.batch - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            parts.append(super().logits(filled)[: len(part)])
        return torch.cat(parts)

    def reads_more(self, needs: Needs) -> bool:
        """Whether anything but logits and the gradient at the image is asked for."""
        return needs.any_attention or bool(needs.seen_states) or needs.backward is not None

    def refusal(self, working: str) -> str:
        """What is missing, and what to do."""
        return (
            f"found an exported graph of which only the logits can be used: {self._reason}. Pass the torch.nn.Module "
            f"that it was made from, or take a method that works on it: {working}"
        )
