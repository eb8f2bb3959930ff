"""What the server does not do for its visitors: fetch addresses for them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

_FETCHES = ("file=http:", "file=https:", "/proxy=")
_ADDRESSES = ("http:", "https:")

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]


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
        receive: _Receive,
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        arrived = await _arrived(receive) if _has_values(scope) else []
        if _asks_by_path(scope) or _asks_in_values(b"".join(each.get("body", b"") for each in arrived)):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this server fetches nothing from elsewhere"})
            return

        async def receive_again() -> _Message:
            return arrived.pop(0) if arrived else await receive()

        await self.app(scope, receive_again, send)


def _asks_by_path(scope: _Message) -> bool:
    path = unquote(str(scope.get("path", ""))).lower()
    return scope["type"] == "http" and any(each in path for each in _FETCHES)


def _has_values(scope: _Message) -> bool:
    """Whether a request may bring values of the page's components; files themselves come in parts, and stream on."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return not kinds or not kinds[0].lower().startswith(b"multipart/")


async def _arrived(receive: _Receive) -> list[_Message]:
    """The messages of a request, to the end of its body."""
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _asks_in_values(body: bytes) -> bool:
    """Whether a file, at any depth, is said to lie at an address: Gradio would fetch it for any component.

    Its ``url`` may be one. A browser sends that of its upload along, and Gradio does not fetch it.
    """
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):  # Gradio cannot read it either
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if str(value.get("path")).strip().lower().startswith(_ADDRESSES):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
