"""Pictures in notebooks and windows."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def show_image(image: Image) -> None:
    """Shows an image in the notebook, or in the system's image viewer."""
    try:
        from IPython import display, get_ipython
    except ImportError:
        image.show()
        return
    if get_ipython() is None:
        image.show()
    else:
        notebook: Any = display
        notebook.display(image)


def png_address(image: Image) -> str:
    """The image as a ``data:`` address that holds all of it, losslessly."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def image_html(image: Image, text: str, scale: float = 2) -> str:
    """An ``img`` element that holds its picture, without script.

    Args:
        image: drawn at `scale` pixels for a logical one.
        text: what it shows, for those who cannot see it.
        scale: how sharp the picture is.
    """
    width = round(image.width / scale)
    return f'<img src="{png_address(image)}" width="{width}" style="max-width:100%" alt="{html.escape(text)}">'
