"""Everything that can go wrong, as one tree.

::

    VitExplainError
    ├── UnknownNameError        (LookupError)   no such method, model, option or class label
    ├── OptionError             (ValueError)    an option has a value the method cannot take
    ├── UnsupportedModelError   (TypeError)     the model offers no way to do what was asked
    ├── CaptureError            (RuntimeError)  the forward pass did not yield what was needed
    ├── TargetError             (ValueError)    the target does not fit the model's output
    ├── InputError              (ValueError)    an image, file or tensor cannot be used
    ├── NotTrainedError         (RuntimeError)  the method needs training first
    ├── CheckpointError         (ValueError)    a checkpoint is missing, broken or of another model
    └── ExportError             (RuntimeError)  results cannot be written

Each error also derives from the built-in a caller would guess. Messages say what was found, what was
expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitExplainError(Exception):
    """Base of all errors raised on purpose by this package."""


class UnknownNameError(VitExplainError, LookupError):
    """A name (method, model, option, label) that does not exist."""

    @classmethod
    def listing(cls, kind: str, name: str, known: Iterable[str], remedy: str = "") -> UnknownNameError:
        """Builds the error for `name`, with close matches first and everything possible after.

        Args:
            kind: what was looked up, e.g. ``"method"``.
            name: what was asked for.
            known: all valid names.
            remedy: one more sentence on what to do.
        """
        known = sorted(known)
        close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(repr(match) for match in close)}?)" if close else ""
        message = f"no {kind} called {name!r}{hint}. Known: {', '.join(known) or 'none'}."
        return cls(f"{message} {remedy}".rstrip())


class OptionError(VitExplainError, ValueError):
    """An option's value is outside what the method or command can take."""


class UnsupportedModelError(VitExplainError, TypeError):
    """The model, or this part of it, cannot be explained in the way that was asked."""


class CaptureError(VitExplainError, RuntimeError):
    """A forward or backward pass did not yield the attention or token states that a method needs."""


class TargetError(VitExplainError, ValueError):
    """The target does not fit the model's output."""


class InputError(VitExplainError, ValueError):
    """An image, a file or a tensor cannot be used as input."""


class NotTrainedError(VitExplainError, RuntimeError):
    """The method learns, and has not been trained or given a checkpoint."""


class CheckpointError(VitExplainError, ValueError):
    """A checkpoint is missing, unreadable, or belongs to another model."""


class ExportError(VitExplainError, RuntimeError):
    """Results cannot be written where they were asked for."""


class ExplanationWarning(UserWarning):
    """A map came out, but something about it needs the reader's attention (constant, zero gradient, NaN)."""


def says_out_of_memory(message: str) -> bool:
    """Whether an exception's type and message, from Python, NumPy or torch, say that memory ran out."""
    return any(each in message for each in ("MemoryError", "OutOfMemory", "allocate memory", "not enough memory"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on the device or beside it."""
    return says_out_of_memory(f"{type(error).__name__}: {error}")
