"""What stands in the place of pixels that are taken away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..randomness import DRAWN
from .draws import generators
from .predictor import Predictor

BLUR_KERNEL, BLUR_SIGMA = 11, 5.0
"""Side and standard deviation of the Gaussian, in pixels, as in RISE."""


def replacement_images(name: str, inputs: Tensor, predictor: Predictor, seed: int = 0) -> Tensor:
    """What replaces the pixels of normalised images.

    - ``black``: 0 in [0, 1], before normalisation.
    - ``zeros``: 0 in normalised space, the mean colour of the data that the model was normalised with.
    - ``blur``: the image under an 11×11 Gaussian of sigma 5, reflected at its edges.
    - ``noise``: uniform in [-1, 1] in normalised space. Each image has its own, drawn from `seed` and its pixels: the
      same in any batch and in any order, so a resumed run equals an unbroken one.
    - ``image_mean``: the mean colour of the image itself.

    Args:
        name: one of `REPLACEMENTS`.
        inputs: (B, 3, H, W), normalised.
        predictor: knows the normalisation, which ``black`` needs.
        seed: of the noise.

    Returns:
        (B, 3, H, W) of the inputs' dtype and device; may be an expanded view.

    Raises:
        InputError: black is asked for, and how images are normalised is not known.
    """
    return _REPLACEMENTS[name](inputs, predictor, seed).to(inputs).expand_as(inputs)


def _black(inputs: Tensor, predictor: Predictor, seed: int) -> Tensor:
    return predictor.colour(0)


def _zeros(inputs: Tensor, predictor: Predictor, seed: int) -> Tensor:
    return inputs.new_zeros(1)


def _blur(inputs: Tensor, predictor: Predictor, seed: int) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    blurred: Tensor = gaussian_blur(inputs, [BLUR_KERNEL, BLUR_KERNEL], [BLUR_SIGMA, BLUR_SIGMA])
    return blurred


def _noise(inputs: Tensor, predictor: Predictor, seed: int) -> Tensor:
    own = generators(inputs, seed)
    return torch.stack([torch.empty(inputs.shape[1:], **DRAWN).uniform_(-1, 1, generator=each) for each in own])


def _image_mean(inputs: Tensor, predictor: Predictor, seed: int) -> Tensor:
    return inputs.float().mean((2, 3), keepdim=True)


_REPLACEMENTS: dict[str, Callable[[Tensor, Predictor, int], Tensor]] = {
    "black": _black,
    "zeros": _zeros,
    "blur": _blur,
    "noise": _noise,
    "image_mean": _image_mean,
}
REPLACEMENTS = tuple(_REPLACEMENTS)
"""Names that `replacement_images` knows."""
