"""Libraries that only some data sets need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import VitExplainError


def import_optional(module: str, purpose: str) -> Any:
    """A module of the extra ``data``.

    Args:
        module: its name.
        purpose: what needs it, for the error.

    Raises:
        VitExplainError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise VitExplainError(
            f"{purpose} need {module.partition('.')[0]}, which cannot be imported ({error}); install it with: "
            "pip install 'vitexplain[data]'"
        ) from error
