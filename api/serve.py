"""Serve a gateway by HTTP and by gRPC on one event loop."""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Iterator

import uvicorn

from baton.api.gateway import Gateway
from baton.api.grpc_service import InferenceServer
from baton.api.http.app import build_app
from baton.api.http.connection import Connection
from baton.core.config import TlsConfig
from baton.core.errors import InvalidConfig
from baton.core.tasks import TaskSet
from baton.core.tls_files import WatchedTls, server_context

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
"""For answers that are still being sent when the front door closes."""
_LOOK_S = 2.0
"""Between two looks at files that may change: API keys and certificates."""
_SEND_BUFFER_BYTES = 128 << 10
"""The kernel's, of each connection: by itself it would let megabytes wait for a slow reader."""


class FrontDoor:
    """Both APIs of a started gateway. It closes the gateway when it is closed."""

    def __init__(
        self,
        gateway: Gateway,
        http: "_HttpServer",
        host: str,
        http_port: int,
        grpc: InferenceServer,
    ) -> None:
        self.gateway = gateway
        scheme = "http" if gateway.config.tls is None else "https"
        self.http_url = f"{scheme}://{_bracketed(host)}:{http_port}"
        """Without the /v1 that OpenAI's clients want in their base URL."""
        self.grpc_address = grpc.address
        """host:port."""
        self._http = http
        self._grpc = grpc
        self._tasks = TaskSet()
        self._looking: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, gateway: Gateway) -> "FrontDoor":
        """Listen where the gateway's config says.

        Raises InvalidConfig if a port is in use, or a certificate not as it should be.
        """
        config = gateway.config
        tls = None if config.tls is None else _HttpTls(config.tls)
        listener = _listen(config.host, config.http_port)
        try:
            grpc = await InferenceServer.start(gateway)
        except InvalidConfig:
            listener.close()
            raise
        http = _HttpServer(gateway, tls)
        door = cls(gateway, http, config.host, listener.getsockname()[1], grpc)
        door._tasks.start(http.serve(sockets=[listener]))
        async with asyncio.timeout(_START_TIMEOUT_S):
            await http.ready.wait()
        door._looking = door._tasks.start(_look(gateway, tls))
        return door

    async def close(self, grace_s: float = 5.0) -> None:
        """Refuse new requests, give open ones `grace_s` seconds, then end them with an error."""
        await self.gateway.drain(grace_s)
        await self.gateway.close()
        await self._grpc.close()
        self._http.should_exit = True
        if self._looking is not None:
            self._looking.cancel()
        await self._tasks.drain(2 * _STOP_TIMEOUT_S)
        self._tasks.check()

    def __repr__(self) -> str:
        return f"FrontDoor({self.http_url}, {self.grpc_address})"


class _HttpServer(uvicorn.Server):
    """uvicorn as a guest: signals belong to the host process, and start-up is an event."""

    def __init__(self, gateway: Gateway, tls: "_HttpTls | None") -> None:
        super().__init__(
            uvicorn.Config(
                build_app(gateway),
                ws="none",
                h11_max_incomplete_event_size=gateway.config.limits.max_header_bytes,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(_STOP_TIMEOUT_S),
            )
        )
        self.ready = asyncio.Event()
        self._gateway = gateway
        self._tls = None if tls is None else tls.context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with connections of our own, and deadlines for the handshakes of TLS."""
        await self.lifespan.startup()
        limits = self._gateway.config.limits
        handshake_s = None if self._tls is None else limits.header_timeout_s
        connect = functools.partial(
            Connection,
            limits,
            self._gateway.metrics,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self.servers = [
            await asyncio.get_running_loop().create_server(
                connect,
                sock=listener,
                ssl=self._tls,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=handshake_s,
                backlog=self.config.backlog,
            )
            for listener in sockets or ()
        ]
        self.started = True
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _HttpTls:
    """A server's side of TLS that takes new certificates for connections to come."""

    def __init__(self, config: TlsConfig) -> None:
        self._watched = WatchedTls(config)
        self.context = server_context(config)
        """For the listening socket, which keeps it; handshakes go on with the newest one."""
        self.context.sni_callback = self._exchange

    def _exchange(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        # Certificate, key and authorities change together. Exchanging them one by one in a context
        # that is in use would break the handshakes between.
        connection.context = self._watched.context

    def refresh(self) -> None:
        """Look at the files, and take what is new and good."""
        self._watched.changed()


async def _look(gateway: Gateway, tls: _HttpTls | None) -> None:
    """Take over changed files until cancelled; gRPC looks after its certificates itself."""
    if tls is None and not gateway.identity.asks:
        return
    while True:
        await asyncio.sleep(_LOOK_S)
        await asyncio.to_thread(gateway.identity.refresh)
        if tls is not None:
            await asyncio.to_thread(tls.refresh)


def _listen(host: str, port: int) -> socket.socket:
    """Bind and listen; only the address that is really in use is refused, not one in TIME_WAIT."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidConfig("host", host, f"an address of this machine ({error})") from None
    # With the protocol named, asyncio turns off Nagle's algorithm for what is accepted: otherwise a
    # token waits up to 40 ms for the client's delayed acknowledgement of the one before.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        allowed = f"a port that is free on {host} ({error.strerror})"
        raise InvalidConfig("http_port", port, allowed) from None
    listener.setblocking(False)
    return listener


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
