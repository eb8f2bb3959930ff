"""Models of which tokens can be left out, as methods need them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from .capture import Capture
from .errors import UnsupportedModelError
from .layout import TokenLayout
from .metrics.predictor import Predictor
from .metrics.token_dropping import TokenDropper
from .models.adapter import ModelAdapter

_tried: WeakKeyDictionary[ModelAdapter, set[TokenLayout]] = WeakKeyDictionary()


def token_dropper(capture: Capture, batch_size: int) -> TokenDropper:
    """A captured model of which tokens can be left out; whether it is one is tried once for each grid.

    Args:
        capture: after its forward pass.
        batch_size: images in one forward.

    Raises:
        UnsupportedModelError: its blocks do not treat tokens as a set.
    """
    predictor = Predictor(capture.adapter, batch_size=batch_size)
    known = _tried.setdefault(capture.adapter, set())
    if capture.layouts[0] in known:
        return TokenDropper(predictor, capture.layouts[0])
    try:
        dropper = TokenDropper.of(predictor, capture.images)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error}. Methods that leave tokens in: generic_attention, rise, vit_cx"
        ) from error
    known.add(dropper.layout)
    return dropper
