"""Lets readers in: one thread accepts, and each reader has one that serves it."""

import contextlib
import socket
import threading
from collections.abc import Callable

from baton.core.errors import TransportError
from baton.core.log import get_logger
from baton.kv_transfer.link.stream import wake

MAX_READERS = 1024
"""Connections at once; more are closed at once."""

_PAUSE_S = 0.05
"""After accept has failed, for want of descriptors for example."""

_log = get_logger(__name__)


class Server:
    """Owns a listening socket and the connections made to it."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        """`serve` authenticates and serves one connection until it ends."""
        self._listener = listener
        self._serve = serve
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._readers: dict[socket.socket, threading.Thread] = {}
        self._thread = threading.Thread(target=self._accept, name="baton-kv-accept", daemon=True)
        self._thread.start()

    @property
    def readers(self) -> int:
        """How many connections are open."""
        return len(self._readers)

    def stop(self) -> None:
        """Close everything; return when no thread reads the region any more. Safe to repeat."""
        self._stopping.set()
        wake(self._listener)
        self._thread.join()
        with self._lock:
            readers = list(self._readers.items())
        for connection, _ in readers:
            wake(connection)
        for _, thread in readers:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._stopping.wait(_PAUSE_S):
                    _log.warning("transport.accept_failed", error=str(error))
                continue
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            if self._stopping.is_set() or len(self._readers) >= MAX_READERS:
                connection.close()
                return
            thread = threading.Thread(
                target=self._run, args=[connection], name="baton-kv-serve", daemon=True
            )
            self._readers[connection] = thread
        thread.start()

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except TransportError as error:
            if not self._stopping.is_set():
                _log.info("transport.reader_refused", reason=str(error))
        except OSError:  # the reader went away
            pass
        finally:
            with self._lock:
                del self._readers[connection]
            with contextlib.suppress(OSError):
                connection.close()
