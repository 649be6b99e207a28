"""The one thread that calls UCX: it takes commands, moves bytes, and sleeps when there are none."""

import concurrent.futures
import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from baton.core.errors import PeerLost, TransportError
from baton.kv_transfer.base import Counters, Done, outcome
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Peer, Region, Transfer
from baton.kv_transfer.ucx import structs as s
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.endpoint import Endpoint, as_transport_error
from baton.kv_transfer.ucx.libucp import load
from baton.kv_transfer.ucx.session import Session

_NAP_S = 0.001
"""Longest sleep while something is under way: not every transport signals all that it does."""
_SETTLE_S = 5.0
"""How long `stop` lets endpoints close and UCX settle before it leaves them as they are."""


class _Command(NamedTuple):
    run: Callable[[], None]
    refuse: Callable[[TransportError], None]
    """Called instead of `run` if the thread has ended."""


class UcxWorker:
    """Owns the thread, and through it the session and the endpoints.

    Public methods are for the event loop; what begins with an underscore runs in the thread.
    """

    def __init__(self, region: Region, config: UcxConfig, counters: Counters) -> None:
        self._counters = counters
        self.address = b""
        self.key = b""
        self._region = region
        self._config = config
        self._commands: deque[_Command] = deque()
        self._lock = threading.Lock()
        self._ended: TransportError | None = None
        self._stopping = False
        self._give_up_at = 0.0
        self._endpoints: dict[int, Endpoint] = {}
        self._fences: dict[int, list[Done]] = {}
        self._on_error = s.ErrorCallback(self._endpoint_failed)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._started: Done = concurrent.futures.Future()
        self._stopped: Done = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, name="baton-ucx", daemon=True)

    async def start(self) -> None:
        """Start the thread; raises TransportError if UCX cannot be opened."""
        self._thread.start()
        await outcome(self._started)

    def connect(self, peer: Peer, metadata: Metadata) -> Done:
        """Open an endpoint to `peer`; the result may be a TransportError."""
        done: Done = concurrent.futures.Future()
        try:
            self._submit(_Command(lambda: self._connect(peer, metadata, done), done.set_exception))
        except TransportError as error:
            done.set_exception(error)
        return done

    def post(self, transfer: Transfer, runs: RunTable) -> None:
        """Start a transfer; raises TransportError if too many wait or the thread has ended."""
        if len(self._commands) >= self._config.max_queued:
            raise TransportError(f"{self._config.max_queued} transfers wait for the UCX thread")

        def refuse(error: TransportError) -> None:
            self._counters.ended(transfer, "none", error)

        self._submit(_Command(lambda: self._post(transfer, runs), refuse))

    def disconnect(self, peer: Peer) -> Done:
        """Close the endpoint to `peer`; done when its transfers have completed."""
        done: Done = concurrent.futures.Future()
        try:
            self._submit(
                _Command(lambda: self._disconnect(peer, done), lambda _: done.set_result(None))
            )
        except TransportError:  # the thread has ended, and with it every transfer
            done.set_result(None)
        return done

    def request_stop(self) -> None:
        """Have the thread close all endpoints and end; see `stop`."""
        with contextlib.suppress(TransportError):  # it has ended already
            self._submit(_Command(self._stop, lambda error: None))

    async def stop(self) -> None:
        """Close all endpoints; return when the thread has ended. Safe to repeat."""
        self.request_stop()
        await outcome(self._stopped)

    @property
    def endpoints(self) -> int:
        """How many endpoints are not fenced."""
        return len(self._endpoints)

    def usable(self, peer: Peer) -> bool:
        """Return True unless the connection to `peer` is lost or closed."""
        endpoint = self._endpoints.get(peer.number)
        return endpoint is not None and endpoint.usable

    def _submit(self, command: _Command) -> None:
        with self._lock:
            if self._ended is not None:
                raise TransportError(str(self._ended))
            self._commands.append(command)
            os.eventfd_write(self._wake_fd, 1)

    # In the thread.

    def _main(self) -> None:
        try:
            session = Session(load(), self._config, self._region)
        except Exception as error:
            failure = TransportError(str(error))  # OSError too: a library that does not load
            self._end(failure)
            self._started.set_exception(failure)
            return
        self._session = session
        self.address, self.key = session.address, session.key
        ended = TransportError("the transport is closed")
        try:
            with select.epoll() as poll:
                poll.register(self._wake_fd, select.EPOLLIN)
                poll.register(session.event_fd, select.EPOLLIN)
                self._started.set_result(None)
                self._loop(poll)
        except Exception as error:
            ended = TransportError(f"the UCX thread failed: {error!r}")
            raise
        finally:
            try:
                session.close()
            finally:  # whatever happens: nobody may wait for a thread that has ended
                self._end(ended)

    def _loop(self, poll: select.epoll) -> None:
        lib, worker = self._session.lib, self._session.worker
        while True:
            self._run_commands()
            if self._stopping and self._may_end():
                return
            busy = lib.progress(worker)
            self._reap()
            if not busy and not self._commands:
                self._sleep(poll)

    def _may_end(self) -> bool:
        closed = not self._endpoints
        return (closed and self._session.settle()) or time.monotonic() > self._give_up_at

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft().run()

    def _sleep(self, poll: select.epoll) -> None:
        status = self._session.lib.ucp_worker_arm(self._session.worker)
        if status == s.ERR_BUSY:
            return
        self._session.lib.expect_ok(status, "arm its event descriptor")
        idle = not self._stopping and all(endpoint.idle for endpoint in self._endpoints.values())
        for fd, _ in poll.poll(-1 if idle else _NAP_S):
            if fd == self._wake_fd:
                os.eventfd_read(fd)

    def _connect(self, peer: Peer, metadata: Metadata, done: Done) -> None:
        endpoint = self._endpoints[peer.number] = Endpoint(self._session, peer)
        try:
            endpoint.open(metadata, self._on_error)
        except Exception as error:  # a bug too: whoever waits must not wait for ever
            done.set_exception(as_transport_error(error))
            self._disconnect(peer, concurrent.futures.Future())
        else:
            done.set_result(None)

    def _post(self, transfer: Transfer, runs: RunTable) -> None:
        endpoint = self._endpoints.get(transfer.peer.number)
        if endpoint is None:
            lost = PeerLost(f"{transfer.peer} was removed")
            self._counters.ended(transfer, "none", lost)
        else:
            endpoint.post(transfer, runs)

    def _disconnect(self, peer: Peer, done: Done) -> None:
        endpoint = self._endpoints.get(peer.number)
        if endpoint is None:
            done.set_result(None)
        else:
            self._fences.setdefault(peer.number, []).append(done)
            endpoint.close()

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._give_up_at = time.monotonic() + _SETTLE_S
        for endpoint in self._endpoints.values():
            self._disconnect(endpoint.peer, concurrent.futures.Future())

    def _endpoint_failed(self, number: int, handle: int, status: int) -> None:
        self._endpoints[number].status = status

    def _reap(self) -> None:
        for number, endpoint in list(self._endpoints.items()):
            for completed in endpoint.reap():
                self._counters.ended(*completed)
            # A lost endpoint stays until it is removed, so that reads of it say so.
            if endpoint.closed and number in self._fences:
                del self._endpoints[number]
                for done in self._fences.pop(number):
                    done.set_result(None)

    def _end(self, why: TransportError) -> None:
        with self._lock:
            self._ended = why
            os.close(self._wake_fd)
        for command in self._commands:
            command.refuse(why)
        for endpoint in self._endpoints.values():
            for completed in endpoint.abandon(why):
                self._counters.ended(*completed)
        for fence in self._fences.values():
            for done in fence:
                done.set_result(None)
        self._endpoints.clear()
        self._fences.clear()
        self._stopped.set_result(None)
