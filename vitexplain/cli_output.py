"""What commands say beside their results, and the code they end with where some of it failed."""

from __future__ import annotations

import sys

SOME_FAILED = 1
"""Exit code where some images could not be done, and the others were."""


def say(text: str) -> None:
    """A line on the error stream: around a progress bar, not through it."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def say_error(error: Exception | str) -> None:
    """One line about something that failed."""
    say(f"error: {' '.join(str(error).splitlines())}")
