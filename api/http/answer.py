"""Answer a valid call, streamed or whole, and cancel it at once when its client goes away."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from baton.api.choices import choice_pieces
from baton.api.gateway import Gateway
from baton.api.http.errors import error_response
from baton.api.http.event_stream import DONE, EventStream, TextEvents, send_whole, sse_event
from baton.api.http.logprobs import Json
from baton.api.http.openai_format import Choice, Format
from baton.api.http.timing import timing
from baton.api.text_stream import Piece
from baton.api.tool_calls import Text
from baton.api.validate import Call
from baton.core.errors import BatonError
from baton.core.spans import TtftSpans

_SLOW_READER_S = 30.0
"""How much longer than the request itself may take its client may take to read the answer."""


class Answer(Response):
    """Runs a call while it watches the connection; the call never outlives its client."""

    def __init__(self, gateway: Gateway, call: Call, form: Format) -> None:
        super().__init__()
        self._gateway = gateway
        self._call = call
        self._form = form
        self._ttft: dict[int, TtftSpans] = {}
        """By choice, of those that have ended."""
        self._texts: dict[int, TextEvents] = {}
        """By choice."""
        self._choices = [
            Choice(
                index,
                0 if index % call.choices_per_prompt else len(request.generate.prompt),
                form.writer(),
                request.echo or "",
                call.tools,
            )
            for index, request in enumerate(call.requests)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request."""
        config = self._gateway.config
        limit_s = config.request_timeout_s + _SLOW_READER_S
        with contextlib.suppress(TimeoutError):  # Its client is gone: nobody to answer.
            async with asyncio.timeout(limit_s) as limit, asyncio.TaskGroup() as group:
                watcher = group.create_task(_expire_when_gone(receive, limit))
                if self._call.stream:
                    stream = EventStream(send, self._extra_headers())
                    alive = group.create_task(stream.keep_alive(config.sse_keep_alive_s))
                    await self._stream(stream)
                    alive.cancel()
                else:
                    await self._whole(send)
                watcher.cancel()

    async def _whole(self, send: Send) -> None:
        response: Response
        try:
            async with aclosing(self._pieces()) as pieces:
                async for choice, piece in pieces:
                    choice.keep(choice.read(piece))
                    if (logprobs := choice.writer.of(piece)) is not None:
                        choice.logprobs.append(logprobs)
            body = self._form.whole(self._choices) | self._timing()
            response = JSONResponse(body, headers=self._extra_headers())
        except BatonError as error:
            response = error_response(error)
        await send_whole(send, response)

    async def _stream(self, stream: EventStream) -> None:
        """Send events; an error before the first one still has its HTTP status."""
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    await stream.send(event)
        except BatonError as error:
            await stream.fail(error)
        else:
            await stream.end()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of each piece together, the end with the last: a write costs more."""
        opened: set[int] = set()
        open_choices = len(self._choices)
        async with aclosing(self._pieces()) as pieces:
            async for choice, piece in pieces:
                told = self._told(choice, piece, opened)
                open_choices -= piece.finish is not None
                if not open_choices:
                    told += self._end()
                if told:
                    yield b"".join(told)

    def _end(self) -> list[bytes]:
        """Return the events that end the stream."""
        if self._call.include_usage or self._call.tell_timing:
            usage = self._form.usage_chunk(self._choices) | self._timing()
            return [sse_event(usage), DONE]
        return [DONE]

    def _told(self, choice: Choice, piece: Piece, opened: set[int]) -> list[bytes]:
        """Return the events that tell what a piece brought."""
        told: list[bytes] = []
        if choice.index not in opened:
            opened.add(choice.index)
            opening = self._form.opening(choice)
            told += [] if opening is None else [sse_event(opening)]
        events = choice.read(piece)
        logprobs = choice.writer.of(piece)
        if logprobs and not events:
            events = [Text("")]
        for event in events:
            if logprobs is None and isinstance(event, Text):
                told.append(self._text_events(choice).event(event.text))
            else:
                told.append(sse_event(self._form.delta(choice, event, logprobs)))
            logprobs = None
        if piece.finish is not None:
            told.append(sse_event(self._form.closing(choice)))
        return told

    def _text_events(self, choice: Choice) -> TextEvents:
        found = self._texts.get(choice.index)
        if found is None:
            found = TextEvents(lambda text: self._form.delta(choice, Text(text)))
            self._texts[choice.index] = found
        return found

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
