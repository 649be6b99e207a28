"""Server-sent events over ASGI: framing, the first status, and comments in long silence."""

import asyncio
import json
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring

from starlette.responses import Response
from starlette.types import Message, Send

from baton.api.http.errors import error_body, error_response
from baton.core.errors import BatonError

DONE = b"data: [DONE]\n\n"
_MARK = "\0"
_ENCODED_MARK = b'"\\u0000"'
_KEEP_ALIVE = b": keep-alive\n\n"


def sse_event(body: Mapping[str, object]) -> bytes:
    """Return one server-sent event."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class TextEvents:
    """Events of which only one string differs: the rest of them is encoded once."""

    def __init__(self, body: Callable[[str], Mapping[str, object]]) -> None:
        """`body` makes the body of the event with a text."""
        self._before, _, self._after = sse_event(body(_MARK)).rpartition(_ENCODED_MARK)

    def event(self, text: str) -> bytes:
        """Return the event with that text, as `sse_event` would."""
        return self._before + encode_basestring(text).encode() + self._after


class EventStream:
    """One answer. It begins with its first event or comment; before, an error has its status."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = {"content-type": "text/event-stream", **headers}
        self._begun = False
        self._ended = False
        self._sent_at = asyncio.get_running_loop().time()
        self._one_at_a_time = asyncio.Lock()

    async def send(self, event: bytes) -> None:
        """Send one event, or several end to end; waits while its reader is slow."""
        async with self._one_at_a_time:
            await self._put(event)

    async def end(self) -> None:
        """End the answer; nothing may follow."""
        async with self._one_at_a_time:
            self._ended = True
            await self._send(_body(b"", more=False))

    async def fail(self, error: BatonError) -> None:
        """End the answer with an error; nothing may follow."""
        async with self._one_at_a_time:
            self._ended = True
            if not self._begun:
                await send_whole(self._send, error_response(error))
                return
            await self._put(sse_event(error_body(error)))
            await self._send(_body(b"", more=False))

    async def keep_alive(self, silence_s: float) -> None:
        """Send a comment whenever nothing was sent for `silence_s` seconds, until cancelled.

        So proxies and clients that end silent connections leave it alone, also while a long prompt
        waits for its turn.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._sent_at + silence_s - loop.time())
            async with self._one_at_a_time:
                if loop.time() >= self._sent_at + silence_s and not self._ended:
                    await self._put(_KEEP_ALIVE)

    async def _put(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            await self._send(_start(200, self._headers))
        await self._send(_body(data))
        self._sent_at = asyncio.get_running_loop().time()


async def send_whole(send: Send, response: Response) -> None:
    """Send an answer that is complete."""
    status, headers = response.status_code, response.raw_headers
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send(_body(bytes(response.body), more=False))


def _start(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _body(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
