"""What the server does not do for its visitors: fetch addresses for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

_FETCHES = ("file=http:", "file=https:", "/proxy=")

_Message = MutableMapping[str, Any]


class OutsideRefused:
    """Middleware that answers requests to fetch other servers' content with 403.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        path = unquote(str(scope.get("path", ""))).lower()
        if scope["type"] == "http" and any(each in path for each in _FETCHES):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this server fetches nothing from elsewhere"})
            return
        await self.app(scope, receive, send)
