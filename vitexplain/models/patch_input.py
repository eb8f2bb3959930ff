"""Models that take an image already cut into patches (SigLIP2's NaFlex variants), called with images like any other."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_ARGUMENTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def takes_patches(model: nn.Module) -> bool:
    """Whether a model asks for patches, their mask and the shape of their grid (transformers' Siglip2 classes)."""
    return set(_ARGUMENTS) <= inspect.signature(model.forward).parameters.keys()


class _Cut(nn.Conv2d):
    """Cuts images into patches, on the device and in the precision that the model behind it has at the time.

    The model is the user's, and moved or converted without what stands before it.

    Args:
        model: takes the patches.
        channels: of the images.
        patch: pixels a side.
    """

    def __init__(self, model: nn.Module, channels: int, patch: int) -> None:
        self._behind = (model,)  # in a tuple, so as not to be a module of this one
        super().__init__(channels, channels * patch * patch, patch, patch, bias=False)
        pixels = torch.eye(channels * patch * patch).reshape(-1, channels, patch, patch)
        order = torch.arange(len(pixels)).reshape(channels, patch, patch).permute(1, 2, 0).flatten()
        self.weight = nn.Parameter(pixels[order].to(next(model.parameters())), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        """Parameters are looked up here; the weight is exact in every precision."""
        found = super().__getattr__(name)
        return found.to(next(self._behind[0].parameters())) if name == "weight" else found


class PatchInput(nn.Module):
    """Cuts images (B, C, H, W) into patches and hands them on, all of them valid, with their grid.

    The cutting is a convolution with one output channel a pixel, so that the patch grid of any image size is found the
    way it is for other models.

    Args:
        model: called with ``pixel_values`` (B, P, p·p·C), row by row, channels innermost; ``pixel_attention_mask``
            (B, P); ``spatial_shapes`` (B, 2).

    Raises:
        UnsupportedModelError: the configuration says neither patch size nor number of channels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = getattr(model, "config", None)
        config = getattr(config, "vision_config", config)
        patch, channels, count = (getattr(config, name, None) for name in ("patch_size", "num_channels", "num_patches"))
        if not (isinstance(patch, int) and isinstance(channels, int) and isinstance(count, int)):
            raise UnsupportedModelError(
                f"a {type(model).__name__} takes images cut into patches, but its configuration does not say "
                f"patch_size, num_channels and num_patches (found {patch}, {channels}, {count}); wrap it in a module "
                "that takes images"
            )
        self.image_size = int(count**0.5) * patch
        self.cut = _Cut(model, channels, patch)
        self.train(model.training)

    @property
    def embedding(self) -> nn.Module:
        """The module whose output is one token (B, P, D) a patch."""
        return cast("nn.Module", cast("Any", self.model).get_input_embeddings())

    def forward(self, images: Tensor) -> Any:
        """What the model returns."""
        patches = self.cut(images)
        batch, _, h, w = patches.shape
        return self.model(
            pixel_values=patches.flatten(2).transpose(1, 2),
            pixel_attention_mask=torch.ones(batch, h * w, dtype=torch.long, device=images.device),
            spatial_shapes=torch.tensor([[h, w]] * batch, device=images.device),
        )
