"""One connection of the HTTP API: uvicorn's, with limits for clients that dawdle or hoard."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from baton.api.http.errors import http_error_response
from baton.core.config import EdgeLimits
from baton.core.metrics import GatewayMetrics


class Connection(H11Protocol):
    """Cuts off a client that sends its headers slowly, or takes nothing of what waits for it.

    Whose connection is cut has gone away as far as its request is concerned: that is cancelled, and
    its blocks are given back. What a client does not take waits in buffers of bounded size, and
    nobody waits for it but the task that answers it.
    """

    def __init__(self, limits: EdgeLimits, metrics: GatewayMetrics, **uvicorn: Any) -> None:
        """`uvicorn`: what uvicorn makes its connections with."""
        super().__init__(**uvicorn)
        self._limits = limits
        self._metrics = metrics
        self._sender_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._untaken = 0
        """Bytes that waited for the client when the reader's timer was set."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, "Service Unavailable", "too many connections are open", "too_many")
        else:
            self._time_sender()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._sender_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # ---- what the client sends -------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take bytes; those after our last word are of no interest."""
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """Take what is complete, and time what is not."""
        super().handle_events()
        if self._answering and not self.flow.write_paused:
            self._stop_reader_timer()  # another answer begins: more may wait, though some is taken
        if self._answering or not self._half_sent:
            if self._sender_timer is not None:
                self._sender_timer.cancel()
                self._sender_timer = None
        else:
            self._time_sender()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _half_sent(self) -> bool:
        """Some of a head is there, or not yet all of the body of a request that is answered."""
        return bool(self.conn.trailing_data[0]) or self.cycle is None or self._body_is_late

    @property
    def _body_is_late(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _time_sender(self) -> None:
        if self._sender_timer is None and not self.transport.is_closing():
            limit_s = self._limits.header_timeout_s
            self._sender_timer = self.loop.call_later(limit_s, self._cut_sender)

    def _cut_sender(self) -> None:
        if self._body_is_late:
            self._metrics.cut("slow_sender")
            self.transport.abort()
        else:
            told = f"the headers took longer than {self._limits.header_timeout_s:g} s"
            self._refuse(408, "Request Timeout", told, "slow_sender")

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, "Bad Request", msg, "bad_http")

    def _refuse(self, status: int, phrase: str, message: str, reason: str) -> None:
        """Say why, and close. There may be no request to answer, so h11 has no part in this."""
        self._metrics.cut(reason)
        body = bytes(http_error_response(status, message).body)
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._time_reader()

    # ---- what the client takes -------------------------------------------------------------

    def pause_writing(self) -> None:
        """Begin to time the client: more waits for it than a buffer is to hold."""
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        """The client has taken something."""
        super().resume_writing()
        self._stop_reader_timer()

    def on_response_complete(self) -> None:
        """Time the end of the answer too: closing waits until the client has taken it."""
        super().on_response_complete()
        self._time_reader()
        if self._body_is_late:
            self._time_sender()

    def _time_reader(self) -> None:
        if self._reader_timer is not None:
            return
        self._untaken = self.transport.get_write_buffer_size()
        if self._untaken:
            limit_s = self._limits.reader_timeout_s
            self._reader_timer = self.loop.call_later(limit_s, self._cut_reader)

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _cut_reader(self) -> None:
        """Cut the client off if it has taken nothing since the timer was set."""
        self._reader_timer = None
        if 0 < self._untaken <= self.transport.get_write_buffer_size():
            self._metrics.cut("slow_reader")
            self.transport.abort()
        else:
            self._time_reader()
