"""Heat over whole photographs, of which a model sees a crop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .boxes import ANNOTATED, draw_boxes
from .errors import InputError
from .images import ImageSource, load_image
from .render import Pixels

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image
    from torch import Tensor

    from .explanation import Explanation

_DIMMING = 2
"""What the crop left out is so many times as dark, so that it is not taken for what did not matter."""
_LEVELS = 8.0
"""Of 255: how far what the model saw may be, on average, from what the preprocessing makes of a photograph. Resizing
otherwise stays below, another picture or another crop does not."""


def overlays_on(
    explanation: Explanation,
    images: ImageSource | Sequence[ImageSource],
    *,
    boxes: Sequence[Tensor | npt.NDArray[Any]] | None = None,
    **options: Any,
) -> Iterator[Pixels]:
    """The overlays of `Explanation.overlay_on`, one image after the other.

    Raises:
        InputError: as there.
    """
    preprocessing = explanation.preprocessing
    if preprocessing is None or preprocessing.size != explanation.image_size:
        known = "not known" if preprocessing is None else f"for {preprocessing.size}, not {explanation.image_size}"
        raise InputError(
            f"how the photographs became the model's input is {known}, so heat has no place on them: explain files or "
            "PIL images, or show what the model saw with overlay"
        )
    listed = images if isinstance(images, list | tuple) else [cast("ImageSource", images)]
    for name, given in (("images", listed), ("boxes", boxes)):
        if given is not None and len(given) != len(explanation):
            raise InputError(f"found {len(given)} {name}, expected {len(explanation)}: one for each image explained")
    for position, image in enumerate(listed):
        loaded = load_image(image)
        _check_seen(explanation, position, preprocessing.view(loaded))
        photograph = np.asarray(loaded)
        top, left, bottom, right = preprocessing.placement(photograph.shape[:2]).window
        inside = slice(max(top, 0), bottom), slice(max(left, 0), right)
        part = photograph[inside]
        beside = max(-top, 0), max(-left, 0)
        shown = slice(beside[0], beside[0] + part.shape[0]), slice(beside[1], beside[1] + part.shape[1])
        seen = np.zeros((bottom - top, right - left, 3), np.uint8)
        seen[shown] = part
        drawn = explanation[position].overlay(seen[None], **options)[0]
        whole = np.empty((*drawn.shape[:-3], *photograph.shape), np.uint8)
        whole[...] = photograph // _DIMMING
        whole[..., inside[0], inside[1], :] = drawn[..., shown[0], shown[1], :]
        if boxes is not None:
            flat = whole.reshape(-1, *photograph.shape)
            whole = draw_boxes(flat, [boxes[position]] * len(flat), color=ANNOTATED).reshape(whole.shape)
        yield whole


def _check_seen(explanation: Explanation, position: int, view: Image) -> None:
    """Makes sure that a photograph is the one that the model saw, where that is known, or heat would lie wrong.

    Raises:
        InputError: it is not.
    """
    if explanation.inputs is None:
        return
    seen = explanation[position].pictures()[0]
    difference = np.abs(seen.astype(np.int16) - np.asarray(view)).mean()
    if difference > _LEVELS:
        raise InputError(
            f"image {position} is not the one that was explained, or was prepared in another way: what the model saw "
            f"differs from it by {difference:.0f} levels of 255 on average. Give the images in their order; of inputs "
            "prepared elsewhere, show what the model saw with overlay"
        )
