"""The form in which a timm model was saved: how many classes and which input size its weights tell; and other sizes."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..errors import ExplanationWarning, InputError
from .timm_family import is_timm_transformer

_logger = logging.getLogger(__name__)


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifiers, of which a distilled one has two; ``head`` where timm names none."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (named,) if isinstance(named, str) else tuple(named)


def saved_form(
    state: Mapping[str, Tensor],
    model: nn.Module,
    said: tuple[int, int] | None,
    asked: tuple[int, int] | None,
) -> dict[str, Any]:
    """What `timm.create_model` has to be told to build the model that weights were saved from.

    Args:
        state: the weights.
        model: the architecture as it is built when nothing is said; its tensors need no content.
        said: the input size that a card beside the weights says, if any.
        asked: the input size that the user names, if any: without a card it tells grids that cannot be square.

    Returns:
        ``num_classes`` and ``img_size``, as far as the weights tell them.
    """
    heads = [state[key] for name in classifiers_of(model) if (key := f"{name}.weight") in state]
    options: dict[str, Any] = {"num_classes": len(heads[0])} if heads and heads[0].ndim > 1 else {}
    size = _saved_size(state, model, said, asked)
    return options if size is None else {**options, "img_size": size}


def set_input_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Makes a plain transformer of timm take images of another size, its position embedding resampled as timm does.

    Other models, and those that take any size, stay as they are.

    Args:
        model: the model, with its weights.
        size: height and width in pixels.

    Raises:
        InputError: the size is no multiple of the patch size.
    """
    embed: Any = getattr(model, "patch_embed", None)
    fixed = getattr(embed, "img_size", None)
    if not is_timm_transformer(model) or getattr(model, "dynamic_img_size", False) or not fixed:
        return
    if tuple(fixed) == tuple(size) or not hasattr(model, "set_input_size") or not hasattr(embed, "set_input_size"):
        return
    height, width = _pixels_of_a_patch(embed)
    if size[0] % height or size[1] % width:
        raise InputError(f"expected multiples of the patch size {height}×{width}")
    cast("Any", model).set_input_size(img_size=tuple(size))
    _logger.info(
        "the model was brought from %d×%d to %d×%d pixels, what it knows of positions resampled", *fixed, *size
    )


def _saved_size(
    state: Mapping[str, Tensor], model: nn.Module, said: tuple[int, int] | None, asked: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The input size that weights were saved for, where it is another than the architecture's own and can be told."""
    own, saved = getattr(model, "pos_embed", None), state.get("pos_embed")
    embed: Any = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if own is None or saved is None or grid is None or own.ndim != 3 or saved.ndim != 3:
        return None
    prefix = own.shape[1] - math.prod(grid)
    patches = saved.shape[1] - prefix
    if patches < 1:
        return None
    height, width = _pixels_of_a_patch(embed)
    area = patches * height * width
    if said is not None and said[0] * said[1] == area:
        return said
    side = math.isqrt(patches)
    square = (side * height, side * width) if side * side == patches else None
    taken = tuple(embed.img_size) if saved.shape[1] == own.shape[1] else square
    fitting = None if asked is None or asked[0] * asked[1] != area else asked
    if taken is None:
        return fitting
    if fitting is not None and fitting != taken:
        warnings.warn(
            f"the weights may be of images of {fitting[0]}×{fitting[1]} pixels or of {taken[0]}×{taken[1]}, which "
            "have as many patches; taken for the latter, and resampled. If that is wrong, build the model with timm "
            "(img_size=…), load them, and explain that",
            ExplanationWarning,
            stacklevel=5,
        )
    return None if taken == tuple(embed.img_size) else taken


def _pixels_of_a_patch(embed: Any) -> tuple[int, int]:
    """Height and width; those of a hybrid's patches include what its convolutions reduce."""
    height, width = (side // count for side, count in zip(embed.img_size, embed.grid_size, strict=True))
    return int(height), int(width)
