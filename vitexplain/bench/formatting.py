"""Numbers as people read them: as many decimals as the interval is wide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_DECIMALS = 6


def decimals_for(estimates: Sequence[Mapping[str, Any]]) -> int:
    """Decimals for a column: two significant digits of the narrowest interval's half, at most `_MOST_DECIMALS`.

    Args:
        estimates: mappings with ``value``, ``low`` and ``high``.
    """
    halves = [(each["high"] - each["low"]) / 2 for each in estimates]
    known = [half for half in halves if math.isfinite(half) and half > 0]
    if not known:
        return 3
    return min(max(1 - math.floor(math.log10(min(known))), 0), _MOST_DECIMALS)


def show_estimate(estimate: Mapping[str, Any], decimals: int | None = None) -> str:
    """``value [low, high]``; a dash where no image allowed the figure, and powers of ten where decimals would hide it.

    Args:
        estimate: mapping with ``value``, ``low`` and ``high``.
        decimals: as many as the interval allows by default.
    """
    if not math.isfinite(estimate["value"]):
        return "–"
    digits = decimals_for([estimate]) if decimals is None else decimals
    largest = max(abs(estimate[name]) for name in ("value", "low", "high") if math.isfinite(estimate[name]))
    hidden = digits == _MOST_DECIMALS and 0 < largest < 10 ** (1 - digits)
    form = ".2e" if hidden else f".{digits}f"
    low, high = (format(estimate[end], form) if math.isfinite(estimate[end]) else "?" for end in ("low", "high"))
    return f"{estimate['value']:{form}} [{low}, {high}]"


def markdown_cell(text: object) -> str:
    """Text as it stands in a cell of a Markdown table: in one line, its bars written out."""
    return " ".join(str(text).split()).replace("|", "\\|")


def show_seconds(seconds: float) -> str:
    """A time with its unit, three significant digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
