"""X-Request-Id: what a client or a proxy calls its request comes back with the answer."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NAME = b"x-request-id"
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """Gives back the header as it came; without one, the answer has the call's own id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request."""
        given = _given(scope) if scope["type"] == "http" else None
        if given is None:
            await self._app(scope, receive, send)
            return

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name != _NAME]
                message = {**message, "headers": [*kept, (_NAME, given)]}
            await send(message)

        await self._app(scope, receive, send_named)


def _given(scope: Scope) -> bytes | None:
    """Return the client's id; one that is too long, or has spaces, is as good as none."""
    for name, value in scope["headers"]:
        if name == _NAME:
            return bytes(value) if _ID.fullmatch(value) else None
    return None
