"""When a connection is timed, and when it is cut; no sockets, and time passes when told to."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from baton.api.http.connection import Connection
from baton.core.config import EdgeLimits
from baton.core.metrics import GatewayMetrics

LIMITS = EdgeLimits(header_timeout_s=7, reader_timeout_s=11)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


class Wire(asyncio.Transport):
    """A client that takes what the test says it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.waiting = 0
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Timer:
    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.delay_s, self.call, self.off = delay_s, call, False

    def cancel(self) -> None:
        self.off = True


class Timers:
    """An event loop whose timers go off when the test says so."""

    def __init__(self) -> None:
        self.all: list[Timer] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        self.all.append(Timer(delay_s, call))
        return self.all[-1]

    def create_task(self, work: Any) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(work)

    def running(self, delay_s: float) -> list[Timer]:
        return [timer for timer in self.all if timer.delay_s == delay_s and not timer.off]

    def ring(self, delay_s: float) -> None:
        (timer,) = self.running(delay_s)
        timer.off = True
        timer.call()


class Server:
    """One connection to an application that answers when the test says so."""

    def __init__(self, limits: EdgeLimits = LIMITS) -> None:
        self.go = asyncio.Event()
        self.answered = asyncio.Event()
        self.timers, self.wire = Timers(), Wire()
        self.metrics = GatewayMetrics()
        self.state = ServerState()
        self.limits = limits
        self.connection = self.connect(self.wire)

    def connect(self, wire: Wire) -> Connection:
        config = uvicorn.Config(self.app, interface="asgi3", log_config=None)
        connection = Connection(
            self.limits,
            self.metrics,
            config=config,
            server_state=self.state,
            app_state={},
            _loop=self.timers,
        )
        connection.connection_made(wire)
        return connection

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.go.wait()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})
        self.answered.set()

    async def answer(self) -> None:
        self.go.set()
        async with asyncio.timeout(60):
            await self.answered.wait()
        self.answered.clear()
        self.go.clear()

    def cuts(self, reason: str) -> bool:
        return f'connections_cut_total{{reason="{reason}"}} 1.0' in self.metrics.render().decode()

    @property
    def senders(self) -> int:
        return len(self.timers.running(LIMITS.header_timeout_s))

    @property
    def readers(self) -> int:
        return len(self.timers.running(LIMITS.reader_timeout_s))


@pytest.fixture
async def server() -> Server:
    return Server()


# Senders


async def test_a_head_is_timed_from_the_start_until_it_is_there(server):
    assert server.senders == 1
    server.connection.data_received(GET[:10])
    server.connection.data_received(GET[10:20])
    assert server.senders == 1, "one deadline, however many pieces there are"
    server.connection.data_received(GET[20:])
    assert server.senders == 0, "however long the answer takes"
    await server.answer()
    assert server.senders == 0, "uvicorn's own timer is for those who ask no more"
    server.connection.data_received(GET[:10])
    assert server.senders == 1, "the next request's head"
    server.timers.ring(7)
    assert b" 408 " in server.wire.written
    assert server.wire.closed
    assert server.cuts("slow_sender")


async def test_the_body_of_an_answered_request_is_timed(server):
    server.connection.data_received(UPLOAD + b"x" * 10)
    assert server.senders == 0, "while it is answered, its body is the application's affair"
    await server.answer()
    assert server.senders == 1
    server.connection.data_received(b"x" * 10)
    assert server.senders == 1
    server.connection.data_received(b"x" * 80)
    assert server.senders == 0
    assert not server.wire.closed


async def test_the_body_of_an_answered_request_that_does_not_end_is_cut(server):
    server.connection.data_received(UPLOAD)
    await server.answer()
    server.timers.ring(7)
    assert server.wire.aborted
    assert server.wire.written.count(b"HTTP/1.1") == 1, "it has had its answer"


async def test_what_is_no_http_is_told_so_in_our_shape(server):
    server.connection.data_received(b"\x16\x03\x01 hello\r\n\r\n")
    assert server.wire.written.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{"message":' in server.wire.written
    assert server.wire.closed
    server.connection.data_received(GET)
    assert server.wire.written.count(b"HTTP/1.1") == 1


async def test_one_connection_too_many_is_told_so(server):
    crowded = Server(LIMITS.model_copy(update={"max_connections": 1}))
    second = Wire()
    crowded.connect(second)
    assert second.written.startswith(b"HTTP/1.1 503 ")
    assert second.closed
    assert not crowded.wire.closed
    assert crowded.cuts("too_many")


# Readers


async def test_a_reader_who_takes_nothing_is_cut(server):
    server.connection.data_received(GET)
    server.wire.waiting = 70_000
    server.connection.pause_writing()
    assert server.readers == 1
    server.timers.ring(11)
    assert server.wire.aborted
    assert server.cuts("slow_reader")
    server.connection.connection_lost(None)
    assert server.readers == 0
    server.go.set()


async def test_a_reader_who_takes_something_has_as_long_again(server):
    server.connection.data_received(GET)
    server.wire.waiting = 70_000
    server.connection.pause_writing()
    server.wire.waiting = 69_000
    server.timers.ring(11)
    assert server.readers == 1
    server.wire.waiting = 10_000
    server.connection.resume_writing()
    assert server.readers == 0
    assert not server.wire.closed
    await server.answer()


async def test_the_end_of_an_answer_is_timed_although_nobody_waits_for_room(server):
    server.connection.data_received(GET)
    server.wire.waiting = 500
    await server.answer()
    assert server.readers == 1
    server.timers.ring(11)
    assert server.wire.aborted


async def test_the_end_of_an_answer_that_is_taken(server):
    server.connection.data_received(GET)
    server.wire.waiting = 500
    await server.answer()
    server.wire.waiting = 0
    server.timers.ring(11)
    assert server.readers == 0
    assert not server.wire.closed


async def test_the_next_answer_does_not_make_the_last_one_seem_untaken(server):
    server.connection.data_received(GET)
    server.wire.waiting = 500
    await server.answer()
    server.connection.data_received(GET)
    server.wire.waiting = 900  # the first was taken; this is of the second
    assert server.readers == 0
    await server.answer()
    assert server.readers == 1
