"""Answer a valid call, streamed or whole, and cancel it at once when its client goes away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from baton.api.choices import choice_pieces
from baton.api.gateway import Gateway
from baton.api.http.errors import error_body, error_response
from baton.api.http.logprobs import Json
from baton.api.http.openai_format import Choice, Format
from baton.api.http.timing import timing
from baton.api.text_stream import Piece
from baton.api.validate import Call
from baton.core.errors import BatonError
from baton.core.spans import TtftSpans

_DONE = b"data: [DONE]\n\n"
_SLOW_READER_S = 30.0
"""How much longer than the request itself may take its client may take to read the answer."""


def sse_event(body: Mapping[str, object]) -> bytes:
    """Return one server-sent event."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Answer(Response):
    """Runs a call while it watches the connection; the call never outlives its client."""

    def __init__(self, gateway: Gateway, call: Call, form: Format) -> None:
        super().__init__()
        self._gateway = gateway
        self._call = call
        self._form = form
        self._ttft: dict[int, TtftSpans] = {}
        """By choice, of those that have ended."""
        self._choices = [
            Choice(
                index,
                0 if index % call.choices_per_prompt else len(request.generate.prompt),
                form.writer(),
            )
            for index, request in enumerate(call.requests)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request."""
        limit_s = self._gateway.config.request_timeout_s + _SLOW_READER_S
        with contextlib.suppress(TimeoutError):  # Its client is gone: nobody to answer.
            async with asyncio.timeout(limit_s) as limit, asyncio.TaskGroup() as group:
                watcher = group.create_task(_expire_when_gone(receive, limit))
                await (self._stream(send) if self._call.stream else self._whole(send))
                watcher.cancel()

    async def _whole(self, send: Send) -> None:
        response: Response
        try:
            async with aclosing(self._pieces()) as pieces:
                async for choice, piece in pieces:
                    choice.text.append(piece.text)
                    if (logprobs := choice.writer.of(piece)) is not None:
                        choice.logprobs.append(logprobs)
            body = self._form.whole(self._choices) | self._timing()
            response = JSONResponse(body, headers=self._extra_headers())
        except BatonError as error:
            response = error_response(error)
        await _send_whole(send, response)

    async def _stream(self, send: Send) -> None:
        """Send events; an error before the first one still has its HTTP status."""
        async with aclosing(self._events()) as events:
            try:
                first = await anext(events)
            except BatonError as error:
                await _send_whole(send, error_response(error))
                return
            await send(_start(200, {"content-type": "text/event-stream"} | self._extra_headers()))
            await send(_body(first))
            try:
                async for event in events:
                    await send(_body(event))
            except BatonError as error:
                await send(_body(sse_event(error_body(error))))
        await send(_body(b"", more=False))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        opened: set[int] = set()
        async with aclosing(self._pieces()) as pieces:
            async for choice, piece in pieces:
                for chunk in self._chunks(choice, piece, opened):
                    yield sse_event(chunk)
        if self._call.include_usage or self._call.tell_timing:
            yield sse_event(self._form.usage_chunk(self._choices) | self._timing())
        yield _DONE

    def _chunks(self, choice: Choice, piece: Piece, opened: set[int]) -> list[Json]:
        chunks: list[Json] = []
        if choice.index not in opened:
            opened.add(choice.index)
            opening = self._form.opening(choice.index)
            chunks += [] if opening is None else [opening]
        logprobs = choice.writer.of(piece)
        if piece.text or logprobs:
            chunks.append(self._form.delta(choice.index, piece.text, logprobs))
        if piece.finish is not None:
            chunks.append(self._form.closing(choice.index, piece.finish))
        return chunks

    async def _pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Yield the pieces of all choices as they come; the first error ends them all."""
        async with aclosing(choice_pieces(self._gateway, self._call)) as pieces:
            async for index, piece in pieces:
                choice = self._choices[index]
                choice.output_tokens += len(piece.tokens)
                if piece.ttft is not None:
                    self._ttft[index] = piece.ttft
                if choice.prompt_tokens:
                    choice.cached_tokens += piece.cached_tokens
                choice.finish = piece.finish
                yield choice, piece

    def _timing(self) -> Json:
        return {"baton": timing(self._call, self._ttft)} if self._call.tell_timing else {}

    def _extra_headers(self) -> dict[str, str]:
        return {"x-request-id": self._call.call_id, "cache-control": "no-cache"}


async def _expire_when_gone(receive: Receive, limit: asyncio.Timeout) -> None:
    """Let `limit` expire at once when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(asyncio.get_running_loop().time())


async def _send_whole(send: Send, response: Response) -> None:
    status, headers = response.status_code, response.raw_headers
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send(_body(bytes(response.body), more=False))


def _start(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _body(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
