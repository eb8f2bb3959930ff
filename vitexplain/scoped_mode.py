"""A watch on torch calls that is kept inside some modules: elsewhere each call would pay for being asked about."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

from torch.overrides import TorchFunctionMode

_Mode = TypeVar("_Mode", bound="ScopedMode")


class ScopedMode(TorchFunctionMode):
    """A `TorchFunctionMode` that hooks switch on and off within its `with`, and that is off behind it in any case."""

    def __init__(self) -> None:
        super().__init__()
        self._on = False

    def __enter__(self: _Mode) -> _Mode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.switch(False)

    def switch(self, on: bool) -> None:
        """Sees calls from now on, or no longer; what was switched on last is switched off first."""
        if on is not self._on:
            self._on = on
            if on:
                super().__enter__()  # type: ignore[no-untyped-call]
            else:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
